"""What a model is asked in an evaluation: rows with a prompt, accepted answers, a language, maybe an English prompt.

`load_task` reads them from a file, from a folder with one L.jsonl per language, or from the Atlas demo's test split.
Columns of a row:
    instruction (and input), prompt, or messages    what the model is asked; one of the three
    instruction_en, prompt_en, or messages_en       the same in English; optional
    answers, answer, or output                      a string, or a list of strings that each count as right
    lang                                            optional in a file named L.jsonl, where it is L; else "und"
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cc_ds.data.columns import FORMS
from cc_ds.data.pairs import BadRow, to_row
from cc_ds.data.sources import open_source

_ANSWER_COLUMNS = ("answers", "answer", "output")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One question."""

    prompt: list[dict[str, str]]
    """Messages, ending with the user's."""
    answers: tuple[str, ...]
    """Each counts as right; at least one, none empty."""
    lang: str
    """Language of the prompt."""
    prompt_en: list[dict[str, str]] | None
    """The same prompt in English, for the upper bound."""
    where: str
    """File and row, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A named list of rows."""

    name: str
    """For the report."""
    rows: list[EvalRow]
    """Never empty."""


def load_task(name: str, path: str | Path | None = None, seed: int = 0) -> Task:
    """Load a task: rows from `path` under any `name`, or, without a path, the built-in one called "atlas".

    `path`: a file (json, jsonl, csv, parquet, arrow), or a folder of L.jsonl files. In a folder where no row has an
    English prompt and en.jsonl has as many rows as each other file, row i of en.jsonl is row i's English prompt
    (the layout of benchmarks translated row by row). `seed`: of the Atlas. ValueError: names file and row.
    """
    if path is not None:
        rows = _read_folder(Path(path)) if Path(path).is_dir() else _read_file(Path(path))
    elif name == "atlas":
        from cc_ds.demo.atlas import build_atlas

        rows = [_row(record, f"atlas test, row {n}", None) for n, record in enumerate(build_atlas(seed).test, start=1)]
    else:
        raise ValueError(
            f'unknown task {name!r}: the built-in task is "atlas"; for another, name its file or folder (--data)'
        )
    return Task(name=name, rows=rows)


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
    row = to_row({**record, "lang": record.get("lang") or lang}, FORMS[-1], where, require_response=False)
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
