"""Write the experiment's rows: training, parallel prompts for the matrix, and what is asked afterwards.

    python experiments/prepare_data.py --data ../shared/data --output experiments_output/data

    train.jsonl          SIB-200 train in the target languages, each row with its English twin
    pairs.jsonl          NTREX sentences in the same prompt, target languages and English, for the Transform Matrix
    ask/TASK.jsonl       questions with options: sib200 (dev, or what --split says; all languages), xnli, xstorycloze
    vocabulary.jsonl     prompts whose tokens a pruned model keeps besides

A prompt is the sentence and a question in its language; the answer is one English word in every language and arm, so
that no arm has to learn to translate topics, and a language left out of training can be scored with the same words. The
options do not stand in the prompt: they would double its length, and every arm learns them from the first few rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cc_ds import cli
from cc_ds.config import read_yaml

TARGETS = ("sw", "yo", "hi", "th", "tr", "ur", "vi", "id", "de")
"""Languages that are trained on."""
LEFT_OUT = ("ar", "bn", "eu", "ru", "te", "zh")
"""Languages that are asked about and not trained on; the wording has more, which would only take longer."""
WORDING = Path(__file__).parent / "configs" / "wording.yaml"
TOPICS = {
    "science/technology": "science",
    "travel": "travel",
    "politics": "politics",
    "sports": "sports",
    "health": "health",
    "entertainment": "entertainment",
    "geography": "geography",
}
BENCHMARKS = {"XNLI": ("1", "2", "3"), "XStoryCloze": ("1", "2")}
"""Name -> the keys of its options."""


def main(argv: list[str] | None = None) -> None:
    """Write every file of rows, pairs and questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with sib200, ntrex, benchmarks"
    )
    parser.add_argument("--output", type=Path, required=True)
    add_choice(parser)
    args = parser.parse_args(argv)
    prepare(args.data, args.output, args.split, args.benchmark_rows)


def add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked."""
    parser.add_argument("--split", default="dev", help="SIB-200 rows that are asked, LANG.SPLIT.jsonl (default dev)")
    parser.add_argument(
        "--benchmark_rows", type=cli.positive, default=20, help="of XNLI and XStoryCloze, per language (default 20)"
    )


def prepare(data: Path, output: Path, split: str = "dev", benchmark_rows: int = 20) -> None:
    """Write every file into `output`.

    Raises:
        ValueError: a missing file, rows that are not parallel, or a training sentence that is asked about too.
    """
    wording = read_yaml(str(WORDING))
    train = {lang: _sib(data, lang, "train") for lang in ("en", *TARGETS)}
    asked = {lang: _sib(data, lang, split) for lang in ("en", *TARGETS, *LEFT_OUT)}
    _check_parallel(train)
    _check_parallel(asked)
    sentences = {row["text"] for rows in asked.values() for row in rows}
    if overlap := [row["text"] for rows in train.values() for row in rows if row["text"] in sentences]:
        raise ValueError(f"{data}/sib200: a sentence stands in train and in {split}: {overlap[0]!r}")

    def prompt(lang: str, text: str) -> str:
        return f"{text}\n{wording[lang]}"

    _write(output / "train.jsonl", _training_rows(train, prompt))
    _write(output / "pairs.jsonl", _pairs(data, prompt))
    _write(output / "ask" / "sib200.jsonl", _questions(asked, prompt))
    for name in BENCHMARKS:
        _write(output / "ask" / f"{name.lower()}.jsonl", _benchmark(data, name, benchmark_rows))
    everything = (_read_sentences(data, lang) for lang in wording)
    _write(
        output / "vocabulary.jsonl",
        ({"prompt": prompt(lang, text)} for lang, texts in zip(wording, everything) for text in texts),
    )


def _training_rows(train: dict[str, list[dict]], prompt) -> Iterator[dict[str, str]]:
    for lang in TARGETS:
        for row, english in zip(train[lang], train["en"], strict=True):
            yield {
                "instruction": prompt(lang, row["text"]),
                "instruction_en": prompt("en", english["text"]),
                "output": TOPICS[row["label"]],
                "lang": lang,
            }


def _pairs(data: Path, prompt) -> Iterator[dict[str, str]]:
    english = _lines(data / "ntrex" / "en.txt")
    for lang in TARGETS:
        for text, twin in zip(_lines(data / "ntrex" / f"{lang}.txt"), english, strict=True):
            yield {"instruction": prompt(lang, text), "instruction_en": prompt("en", twin), "lang": lang}


def _questions(asked: dict[str, list[dict]], prompt) -> Iterator[dict[str, Any]]:
    for lang, rows in asked.items():
        for item, (row, english) in enumerate(zip(rows, asked["en"], strict=True)):
            yield {
                "item": item,
                "lang": lang,
                "prompt": prompt(lang, row["text"]),
                "prompt_en": prompt("en", english["text"]),
                "options": list(TOPICS.values()),
                "answer": TOPICS[row["label"]],
            }


def _benchmark(data: Path, name: str, count: int) -> Iterator[dict[str, Any]]:
    files = {path.stem: _jsonl(path) for path in sorted((data / "benchmarks" / name).glob("*.jsonl"))}
    if "en" not in files:
        raise ValueError(f"{data}/benchmarks/{name}: no en.jsonl")
    for lang, rows in files.items():
        for item, (row, english) in enumerate(zip(rows[:count], files["en"], strict=False)):
            yield {
                "item": item,
                "lang": lang,
                "prompt": row["prompt"],
                "prompt_en": english["prompt"],
                "options": list(BENCHMARKS[name]),
                "answer": row["answer"],
            }


def _sib(data: Path, lang: str, split: str) -> list[dict[str, Any]]:
    return _jsonl(data / "sib200" / f"{lang}.{split}.jsonl")


def _read_sentences(data: Path, lang: str) -> Iterator[str]:
    yield from (row["text"] for split in ("train", "dev") for row in _sib(data, lang, split))
    yield from _lines(data / "ntrex" / f"{lang}.txt")


def _check_parallel(files: dict[str, list[dict]]) -> None:
    for lang, rows in files.items():
        if [(row["id"], row["label"]) for row in rows] != [(row["id"], row["label"]) for row in files["en"]]:
            raise ValueError(f"sib200: {lang} is not row by row the same as en")


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise ValueError(
            f"{path}: can't be read ({error.strerror}); --data must name the folder of the data"
        ) from error


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    cli.run(main)
