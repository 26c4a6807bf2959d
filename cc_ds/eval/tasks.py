"""What a model is asked in an evaluation: rows with a prompt, accepted answers, a language, maybe an English prompt.

`load_task` reads them from a file, from a folder with one L.jsonl per language, from the six benchmarks' data sets on
the Hugging Face hub (hub.py), or from the Atlas demo's test split. Columns of a row in a file:
    instruction (and input), prompt, or messages    what the model is asked; one of the three
    instruction_en, prompt_en, or messages_en       the same in English; optional
    answers, answer, or output                      a string, or a list of strings that each count as right
    lang                                            optional in a file named L.jsonl, where it is L; else "und"
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cc_ds.data.pairs import BadRow, to_row
from cc_ds.data.sources import open_source
from cc_ds.eval.benchmarks import BENCHMARKS
from cc_ds.eval.metrics import METRICS, Reference
from cc_ds.eval.rows import EvalRow, options_of
from cc_ds.eval.text import spellings
from cc_ds.infer.generate import ENGLISH, is_language

_ANSWER_COLUMNS = ("answers", "answer", "output")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named list of rows and how responses to them are scored."""

    name: str
    """For the report."""
    rows: list[EvalRow]
    """Never empty."""
    rules: Mapping[str, str]
    """Name of a score -> the metric that gives it (metrics.py); the first is the headline."""
    spell_out: bool = False
    """Whether numbers, dates, yes and no are accepted in any usual spelling."""
    max_new_tokens: int = 64
    """Tokens that a response may have unless the user says otherwise."""

    @property
    def headline(self) -> str:
        """The score that figures and comparisons show first."""
        return next(iter(self.rules))

    def score(self, row: EvalRow, response: str) -> dict[str, float]:
        """Every score of one response, between 0 and 1; zero for an empty one."""
        answers = row.answers
        if self.spell_out:
            answers = [spelling for answer in answers for spelling in spellings(answer, row.lang)]
        reference = Reference(answers=answers, lang=row.lang, options=row.options)
        return {name: METRICS[metric](response, reference) for name, metric in self.rules.items()}


def load_task(
    name: str,
    path: str | Path | None = None,
    seed: int = 0,
    langs: Iterable[str] | None = None,
    metrics: Iterable[str] | None = None,
    hub_dir: str | Path | None = None,
) -> Task:
    """Load a task: rows from `path` under any `name`; without a path, a benchmark of benchmarks.py or "atlas".

    Args:
        name: of a benchmark (in any case), whose rules then hold for rows from a path too; else of your choice.
        path: a file (json, jsonl, csv, parquet, arrow), or a folder of L.jsonl files. In a folder where no row has an
            English prompt and en.jsonl has as many rows as each other file, row i of en.jsonl is row i's English prompt
            (the layout of benchmarks translated row by row).
        seed: of the Atlas.
        langs: only these languages.
        metrics: in place of the task's own; names of metrics.py.
        hub_dir: a folder with copies of the benchmarks' repositories (hub.py).

    Raises:
        ValueError: a broken row, named with its file; an unknown task or metric; a language that has no rows.
    """
    name = next((known for known in BENCHMARKS if known.casefold() == name.casefold()), name)
    benchmark = BENCHMARKS.get(name)
    if path is not None:
        rows = _with_items(_read_folder(Path(path)) if Path(path).is_dir() else _read_file(Path(path)))
        if benchmark and benchmark.options:
            rows = [_with_options(row, benchmark.options) for row in rows]
    elif benchmark:
        from cc_ds.eval.hub import load_benchmark

        rows = load_benchmark(name, langs, hub_dir)
    elif name == "atlas":
        from cc_ds.demo.atlas import build_atlas

        test = enumerate(build_atlas(seed).test, start=1)
        rows = _with_items([_row(record, f"atlas test, row {number}", None) for number, record in test])
    else:
        raise ValueError(
            f"unknown task {name!r}: there are atlas, {', '.join(BENCHMARKS)}; for another, name its file or folder "
            "(--data)"
        )
    task = Task(name=name, rows=_only(rows, langs), rules=_rules(metrics or ("exact_match", "inclusion")))
    if benchmark is None:
        return task
    return replace(
        task,
        rules=_rules(metrics) if metrics else benchmark.rules,
        spell_out=benchmark.spell_out,
        max_new_tokens=benchmark.max_new_tokens,
    )


def _rules(metrics: Iterable[str]) -> dict[str, str]:
    names = list(metrics)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {', '.join(unknown)}: there are {', '.join(METRICS)}")
    return dict(zip(names, names))


def _only(rows: list[EvalRow], langs: Iterable[str] | None) -> list[EvalRow]:
    wanted = None if langs is None else set(langs)
    there = {row.lang for row in rows}
    if wanted is not None and (unknown := wanted - there):
        raise ValueError(f"no rows in {', '.join(sorted(unknown))}; there are {', '.join(sorted(there))}")
    return [row for row in rows if wanted is None or row.lang in wanted]


def _with_items(rows: Iterable[EvalRow]) -> list[EvalRow]:
    """Name each row's item by its English prompt; without one, by its place among the rows of its language.

    An item has one row a language: rows of a language that share their English prompt (an instruction, where the text
    is in an untranslated input) are told apart by their order. Places join translations of a parallel file. Where the
    files are not parallel they join rows that have nothing in common, and that costs nothing: redrawn together or
    apart, unrelated rows spread the same.
    """
    places: Counter[tuple[str, str]] = Counter()
    named = []
    for row in rows:
        english = row.prompt_en or (row.prompt if is_language(row.lang, ENGLISH) else None)
        prompt = json.dumps(english, ensure_ascii=False, sort_keys=True)
        places[row.lang, prompt] += 1
        content = f"{prompt} {places[row.lang, prompt]}"
        named.append(replace(row, item=hashlib.sha256(content.encode()).hexdigest()[:16]))
    return named


def _with_options(row: EvalRow, keys: str) -> EvalRow:
    if not set(row.answers) <= set(keys):
        raise ValueError(f"{row.where}: the answer {row.answers} is none of the options {', '.join(keys)}")
    return replace(row, options=options_of(row.prompt[-1]["content"], keys))


def _read_file(path: Path) -> list[EvalRow]:
    source = open_source(path)
    # "sw" of sw.jsonl and of sw.test.jsonl.
    stem = path.name.split(".")[0]
    lang = stem if stem.isalpha() and len(stem) in (2, 3) else None
    unit = "line" if path.suffix == ".jsonl" else "row"
    return [_row(record, f"{path}, {unit} {number}", lang) for number, record in source.records()]


def _read_folder(folder: Path) -> list[EvalRow]:
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(
            f"{folder}: no .jsonl files; a task folder holds one file per language, named sw.jsonl and so on"
        )
    files = {path.stem: _read_file(path) for path in paths}
    english = files.get("en")
    counts = {len(rows) for rows in files.values()}
    if english and len(counts) == 1 and all(row.prompt_en is None for rows in files.values() for row in rows):
        files |= {
            lang: [replace(row, prompt_en=twin.prompt) for row, twin in zip(rows, english, strict=True)]
            for lang, rows in files.items()
            if lang != "en"
        }
    return [row for rows in files.values() for row in rows]


def _row(record: Mapping[str, Any], where: str, lang: str | None) -> EvalRow:
    row = to_row({**record, "lang": record.get("lang") or lang}, None, where, require_response=False)
    if isinstance(row, BadRow):
        raise ValueError(f"{where}: {row.reason}" + (f" ({row.detail})" if row.detail else ""))
    return EvalRow(
        prompt=row.prompt, answers=_answers(record, where), lang=row.lang, prompt_en=row.prompt_en, where=where
    )


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    for column in _ANSWER_COLUMNS:
        value = record.get(column)
        if value is None:
            continue
        answers = [value] if isinstance(value, str) else value
        if not isinstance(answers, (list, tuple)) or not answers:
            raise ValueError(f"{where}: {column} must be a text or a list of texts, not {value!r}")
        if not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise ValueError(f"{where}: {column} holds an empty or non-text answer: {value!r}")
        return tuple(answers)
    raise ValueError(f"{where}: no accepted answer; a row needs one of {', '.join(_ANSWER_COLUMNS)}")
