"""The six benchmarks of the paper (section 4.1) as data: languages, how a response is scored, how long it may be.

Accuracy is, by benchmark:
    XNLI, XStoryCloze, MMMLU    choice: the option that the response names is the right one
    XQuAD                       inclusion: the answer stands in the response, after normalisation
    MKQA                        inclusion of any accepted answer or alias; numbers and dates in any usual spelling, yes
                                and no in the language
The authors score free text, and published no script: a generated sentence that holds the answer is right, as people
who ask chat models count it. Beside it, for people who know these two benchmarks from extractive models: `squad_em` and
`f1`, exact match and overlap of words after SQuAD's and MLQA's normalisation. XLSum is scored by ROUGE-L.
"""

from __future__ import annotations

from dataclasses import dataclass

# Languages above 1 % of Common Crawl's text (class H of Lai et al. 2023, arXiv 2304.05613); every other language is
# low-resource here: of the 22, ar bn el eu hi id ko sw te th tr ur yo. The authors' own list is not in their code.
HIGH_RESOURCE = frozenset({"en", "de", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "vi", "zh"})


def resource_level(lang: str) -> str:
    """ "high" or "low", whatever region or script the code adds ("pt-BR"); see HIGH_RESOURCE."""
    return "high" if lang.replace("_", "-").split("-")[0].lower() in HIGH_RESOURCE else "low"


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark."""

    languages: tuple[str, ...]
    """The ten that the paper asks in."""
    rules: dict[str, str]
    """Name of a score -> the metric that gives it (metrics.py); the first is the headline."""
    options: str = ""
    """Keys of a multiple choice, in order."""
    spell_out: bool = False
    """Whether numbers, dates, yes and no are accepted in any usual spelling (text.py, `spellings`)."""
    max_new_tokens: int = 40
    """As in the authors' inference script."""


_QUESTIONS = {"accuracy": "inclusion", "squad_em": "squad_em", "f1": "f1"}

BENCHMARKS = {
    "XNLI": Benchmark(
        languages=("en", "ar", "el", "hi", "ru", "sw", "th", "tr", "ur", "zh"),
        rules={"accuracy": "choice"},
        options="123",
    ),
    "XStoryCloze": Benchmark(
        languages=("en", "ar", "es", "eu", "hi", "id", "ru", "sw", "te", "zh"),
        rules={"accuracy": "choice"},
        options="12",
    ),
    "MMMLU": Benchmark(
        languages=("en", "ar", "bn", "es", "hi", "id", "ko", "pt", "sw", "yo"),
        rules={"accuracy": "choice"},
        options="ABCD",
    ),
    "XQuAD": Benchmark(languages=("en", "ar", "de", "el", "hi", "ru", "th", "tr", "vi", "zh"), rules=_QUESTIONS),
    "MKQA": Benchmark(
        languages=("en", "ar", "de", "ja", "ko", "pt", "ru", "tr", "vi", "zh"), rules=_QUESTIONS, spell_out=True
    ),
    "XLSum": Benchmark(
        languages=("en", "ar", "fr", "hi", "id", "ru", "sw", "tr", "ur", "vi"), rules={"rouge_l": "rouge_l"}
    ),
}
