"""Scores of one response between 0 and 1, by name, and the rule behind each.

A metric reads the response and a `Reference` (accepted answers, language, options). METRICS holds them by name; a task
says which it wants (tasks.py, benchmarks.py). An empty response scores zero by every metric.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cc_ds.eval.text import answer_words, ascii_digits, normalise, words, yes_or_no

# Latin letters with and without diacritics, and combining marks: what a key or a short answer may not touch.
_LATIN = r"A-Za-z\u00c0-\u024f\u1e00-\u1eff\u0300-\u036f"
# "A" before a small letter is an article (English, Portuguese) unless the word is "is" or "because" in a language of
# the benchmarks.
_NO_NOUN = {"is", "was", "es", "é", "adalah", "ni", "because", "since", "porque", "pois", "weil", "karena", "vì", "kwa"}
# What follows a key makes it part of a word ("D-dimer", "d'une"; not Turkish "B'dir", which is "is B"), of a number,
# or of a formula ("A = 3", "A = l * w"; not "2 = Neutral", nor the tag of "2</answer>").
_GOES_ON = (
    rf"[{_LATIN}\d]|[.,]\d|(?<=[A-Za-z])-[{_LATIN}]|(?<=[CDcd])['’][aeiouhàâéèêîôû]"
    r"|\s*(?:[+^]|=\s*(?:[-\d]|\w+\s*[-+*/×^=])|(?!</?\w+>)[<>]=?\s*(?:\d|[A-Za-z]\b))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """What a response is compared with."""

    answers: Sequence[str]
    """Each counts as right; at least one. For a multiple choice: the key of the right option."""
    lang: str = "und"
    """Language of the answers."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of a multiple choice: key ("1", "B") -> the option's text, "" where it is not known."""


def exact_match(response: str, reference: Reference) -> float:
    """1 where the normalised response equals a normalised accepted answer."""
    said = normalise(response)
    return float(bool(said) and any(said == normalise(answer) for answer in reference.answers))


def inclusion(response: str, reference: Reference) -> float:
    """1 where one of the normalised accepted answers stands inside the normalised response.

    Affixes are allowed (Korean particles, Turkish and Swahili endings), as words are not split by spaces everywhere;
    but a number or a Latin word of up to three letters must not touch another Latin letter or digit ("3" is not in
    "1937", nor "b" in "berlin"). Where an answer is "yes" or "no", in English or the language, it is right where the
    response says that before the other (text.py, `yes_or_no`).
    """
    said, lang = normalise(response), reference.lang
    for answer in reference.answers:
        meaning = yes_or_no(answer, lang, whole=True)
        right = yes_or_no(response, lang) == meaning if meaning else _stands_in(normalise(answer), said)
        if right:
            return 1.0
    return 0.0


def squad_em(response: str, reference: Reference) -> float:
    """1 where response and an answer have the same words after SQuAD's and MLQA's normalisation (`answer_words`)."""
    said = answer_words(response, reference.lang)
    return float(bool(said) and any(said == answer_words(answer, reference.lang) for answer in reference.answers))


def f1(response: str, reference: Reference) -> float:
    """Overlap of words with the best of the answers, as SQuAD and MLQA count it (`answer_words`)."""
    said = Counter(answer_words(response, reference.lang))
    return max(
        _f_measure(sum((said & wanted).values()), said.total(), wanted.total())
        for wanted in (Counter(answer_words(answer, reference.lang)) for answer in reference.answers)
    )


def rouge_l(response: str, reference: Reference) -> float:
    """ROUGE-L: F1 of the longest common subsequence of `words`, against the best of the answers; no stemming.

    In Latin script without diacritics it equals Google's rouge_score with use_stemmer=False, whatever stands between
    the words.
    """
    said = words(response)
    return max(
        _f_measure(_common_subsequence(said, wanted), len(said), len(wanted))
        for wanted in (words(answer) for answer in reference.answers)
    )


def choice(response: str, reference: Reference) -> float:
    """1 where the option that the response names (`chosen_option`) is the right one."""
    return float(chosen_option(response, reference.options) in reference.answers)


METRICS: dict[str, Callable[[str, Reference], float]] = {
    "exact_match": exact_match,
    "inclusion": inclusion,
    "squad_em": squad_em,
    "f1": f1,
    "rouge_l": rouge_l,
    "choice": choice,
}


def chosen_option(response: str, options: Mapping[str, str]) -> str | None:
    """The key of the option that a response names, or None where it names none.

    The first of these that is found: the text of one option, as the whole response; a key that opens the response and
    is all of it, or is followed by punctuation or a line break; a key in brackets; a key that stands alone; a key that
    opens the response; the text of an option, where the response holds exactly one (and maybe parts of it). An "A" that
    is an article is no key, nor is what is part of a word, a number or a formula (`_GOES_ON`).
    Digits of every script count.
    """
    if not options:
        return None
    if key := _option_said(response, options):
        return key
    text = ascii_digits(unicodedata.normalize("NFKC", response).strip())
    # The longest first: none of "1" where "10" is meant.
    keys = "|".join(re.escape(key) for key in sorted(options, key=len, reverse=True))
    opening = rf"^[\W_]*({keys})"
    for pattern, flags in (
        (rf"{opening}(?!{_GOES_ON})\s*(?:$|\n|[^\w\s])", re.IGNORECASE),
        (rf"\(\s*({keys})\s*\)", 0),
        (rf"(?<![{_LATIN}\d])(?<!\d[.,])(?<![+^])(?<![+^]\s)({keys})(?!{_GOES_ON})", 0),
        (rf"{opening}(?!{_GOES_ON})", 0),
    ):
        for match in re.finditer(pattern, text, flags):
            if not _is_article(match.group(1), text[match.end(1) :]):
                return next(key for key in options if key.casefold() == match.group(1).casefold())
    said = normalise(response)
    named = {key: text for key, option in options.items() if _stands_in(text := normalise(option), said)}
    # "both level and edge" names that option, and not "edge" or "level".
    whole = [key for key, text in named.items() if all(text == other or text not in other for other in named.values())]
    return whole[0] if len(whole) == 1 else None


def _option_said(response: str, options: Mapping[str, str]) -> str | None:
    """The key of the one option whose text is the whole response, as it is written or else normalised."""
    if normalise(response) in {key.casefold() for key in options}:
        return None
    for form in (lambda text: text.strip().rstrip("."), normalise):
        said = [key for key, option in options.items() if form(option) == form(response) != ""]
        if len(said) == 1:
            return said[0]
    return None


def _is_article(key: str, rest: str) -> bool:
    following = re.match(r"[ \t]+(\w+)", rest)
    return key == "A" and bool(following) and following[1][0].islower() and following[1] not in _NO_NOUN


def _stands_in(answer: str, text: str) -> bool:
    if not answer:
        return False
    if re.fullmatch(rf"[{_LATIN}]{{1,3}}|-?\d+(\D\d+)*", answer):
        return re.search(rf"(?<![{_LATIN}\d])(?<!\d[.,]){re.escape(answer)}(?![{_LATIN}\d]|[.,]\d)", text) is not None
    return answer in text


def _f_measure(common: int, said: int, wanted: int) -> float:
    """Harmonic mean of common / said and common / wanted."""
    return 2 * common / (said + wanted) if common else 0.0


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for token in a:
        diagonal = 0
        for place, other in enumerate(b, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if token == other else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
