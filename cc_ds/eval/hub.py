"""The six benchmarks from their Hugging Face data sets: a record becomes the fields of a prompt and its answers.

    load_dataset(repo, config, split) -> record -> Item (fields, answers, key) -> wording.yaml -> EvalRow

English twins are found by the item's key, which is the same in every language: an id where the set has one, else the
place. A twin whose right option differs is no twin, and leaves the row without English. `hub_dir` names a folder that
holds copies of the repositories (hub_dir/facebook/xnli and so on) for machines that do not reach the hub. Where a
repository is a loading script, which datasets runs no more, the hub's own conversion to parquet is read, or copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cc_ds.eval.benchmarks import BENCHMARKS
from cc_ds.eval.rows import EvalRow, options_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One question in one language, before it is put into words."""

    fields: dict[str, str]
    """What the wording's {names} stand for."""
    answers: tuple[str, ...]
    """Accepted answers; none: there is no short one, and the item is left out."""
    key: Any
    """The same for the same item in every language."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubSource:
    """Where a benchmark lies on the hub."""

    repo: str
    configs: dict[str, str] | None
    """Language -> configuration; None: the language's code."""
    split: str
    item: Callable[[dict[str, Any], int, str], Item]
    """(record, its place, language) -> item."""
    parallel: bool = True
    """Whether an item has an English twin."""


def _xnli(record: dict[str, Any], place: int, lang: str) -> Item:
    fields = {name: record[name] for name in ("premise", "hypothesis")}
    return Item(fields=fields, answers=(str(record["label"] + 1),), key=place)


def _xstorycloze(record: dict[str, Any], place: int, lang: str) -> Item:
    # Without spaces in between, as the authors have it.
    story = "".join(record[f"input_sentence_{number}"].strip() for number in (1, 2, 3, 4))
    fields = {"story": story, "ending1": record["sentence_quiz1"], "ending2": record["sentence_quiz2"]}
    return Item(fields=fields, answers=(str(record["answer_right_ending"]),), key=record["story_id"])


def _mmmlu(record: dict[str, Any], place: int, lang: str) -> Item:
    fields = {"question": record["Question"]} | {key: str(record[key]) for key in "ABCD"}
    return Item(fields=fields, answers=(record["Answer"],), key=(place, record["Subject"]))


def _mmlu(record: dict[str, Any], place: int, lang: str) -> Item:
    fields = {"question": record["question"]} | dict(zip("ABCD", record["choices"], strict=True))
    return Item(fields=fields, answers=("ABCD"[record["answer"]],), key=(place, record["subject"]))


def _xquad(record: dict[str, Any], place: int, lang: str) -> Item:
    fields = {"context": record["context"], "question": record["question"]}
    return Item(fields=fields, answers=tuple(record["answers"]["text"]), key=record["id"])


def _mkqa(record: dict[str, Any], place: int, lang: str) -> Item:
    lang = {"zh": "zh_cn"}.get(lang, lang)
    found = [text for answer in record["answers"][lang] for text in (answer["text"], *(answer["aliases"] or ()))]
    answers = tuple(dict.fromkeys(text for text in found if text and text.strip()))
    return Item(fields={"question": record["queries"][lang]}, answers=answers, key=record["example_id"])


def _xlsum(record: dict[str, Any], place: int, lang: str) -> Item:
    fields = {"title": record["title"], "text": record["text"]}
    return Item(fields=fields, answers=(record["summary"],), key=record["id"])


_MMMLU = {"ar": "AR_XY", "bn": "BN_BD", "es": "ES_LA", "hi": "HI_IN", "id": "ID_ID", "ko": "KO_KR", "pt": "PT_BR",
          "sw": "SW_KE", "yo": "YO_NG"}  # fmt: skip
_XLSUM = {"ar": "arabic", "en": "english", "fr": "french", "hi": "hindi", "id": "indonesian", "ru": "russian",
          "sw": "swahili", "tr": "turkish", "ur": "urdu", "vi": "vietnamese"}  # fmt: skip
_XQUAD = {lang: f"xquad.{lang}" for lang in BENCHMARKS["XQuAD"].languages}
_MKQA = {lang: "mkqa" for lang in BENCHMARKS["MKQA"].languages}

SOURCES = {
    "XNLI": HubSource(repo="facebook/xnli", configs=None, split="test", item=_xnli),
    "XStoryCloze": HubSource(repo="juletxara/xstory_cloze", configs=None, split="eval", item=_xstorycloze),
    "MMMLU": HubSource(repo="openai/MMMLU", configs=_MMMLU, split="test", item=_mmmlu),
    "XQuAD": HubSource(repo="google/xquad", configs=_XQUAD, split="validation", item=_xquad),
    "MKQA": HubSource(repo="apple/mkqa", configs=_MKQA, split="train", item=_mkqa),
    "XLSum": HubSource(repo="csebuetnlp/xlsum", configs=_XLSUM, split="test", item=_xlsum, parallel=False),
}
# MMMLU is a translation of MMLU's test split and does not hold the English itself.
_ENGLISH = {"MMMLU": HubSource(repo="cais/mmlu", configs={"en": "all"}, split="test", item=_mmlu)}


# The branch on which the hub keeps what it converted. It names no configurations: files lie in CONFIG/SPLIT.
_CONVERTED = "refs/convert/parquet"


def load_benchmark(name: str, langs: Iterable[str] | None = None, hub_dir: str | Path | None = None) -> list[EvalRow]:
    """All rows of a benchmark in `langs` (default: the paper's ten), language by language.

    MKQA's questions without a short answer (unanswerable, or a long one) are left out.
    ValueError: a language without wording or configuration, or a data set that cannot be loaded.
    """
    english = None
    rows = []
    for lang in langs or BENCHMARKS[name].languages:
        wording = _wording(name, lang)
        if lang != "en" and SOURCES[name].parallel and english is None:
            english = {item.key: item for _, item in _items(name, "en", hub_dir)}
        for where, item in _items(name, lang, hub_dir):
            if not item.answers:
                continue
            twin = english.get(item.key) if english and lang != "en" else None
            options = BENCHMARKS[name].options
            if twin and options and twin.answers != item.answers:
                twin = None
            prompt = wording.format(**item.fields)
            rows.append(
                EvalRow(
                    prompt=_turn(prompt),
                    answers=item.answers,
                    lang=lang,
                    prompt_en=_turn(_wording(name, "en").format(**twin.fields)) if twin else None,
                    where=where,
                    item=str(item.key) if SOURCES[name].parallel else "",
                    options=options_of(prompt, options),
                )
            )
    return rows


def _items(name: str, lang: str, hub_dir: str | Path | None) -> Iterable[tuple[str, Item]]:
    source = _ENGLISH.get(name, SOURCES[name]) if lang == "en" else SOURCES[name]
    config = lang if source.configs is None else source.configs.get(lang)
    if config is None:
        raise ValueError(f"{name}: {source.repo} is not known to hold {lang!r}; there are {', '.join(source.configs)}")
    path = str(Path(hub_dir) / source.repo) if hub_dir else source.repo
    try:
        records = _load(path, config, source.split)
    except Exception as error:  # not found, no network, no such split ...: one message with the library's own reason
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"{name}: cannot load {config!r}, split {source.split!r}, of the data set {path} "
            f"({type(error).__name__}: {reason}). Check the network, or name local rows (--data) or a folder with "
            f"copies of the repositories (--hub_dir); where one has a loading script, of its branch {_CONVERTED}"
        ) from error
    for place, record in enumerate(records):
        where = f"{path} ({config}), row {place + 1}"
        try:
            yield where, source.item(record, place, lang)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{where}: not in the data set's known format ({error!r}): it holds {record}") from error


def _load(path: str, config: str, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    converted = {split: f"{config}/{split}/*.parquet"}
    if (Path(path) / config / split).is_dir():  # a copy of the branch
        return datasets.load_dataset(path, data_files=converted, split=split)
    try:
        return datasets.load_dataset(path, config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    return datasets.load_dataset(path, data_files=converted, split=split, revision=_CONVERTED)


def _wording(name: str, lang: str) -> str:
    wordings = _wordings()[name]
    if lang not in wordings:
        raise ValueError(
            f"{name}: no prompt is written for {lang!r} (there are {', '.join(wordings)}): add one to "
            "cc_ds/eval/wording.yaml, or name rows with their prompts (--data)"
        )
    return wordings[lang]


@cache
def _wordings() -> dict[str, dict[str, str]]:
    return yaml.safe_load(Path(__file__).with_name("wording.yaml").read_text(encoding="utf-8"))


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
