"""From records to rows: find the columns, check them, and bring every form to one.

A record arrives in one of four forms (see columns.py) and leaves as a `Row`: the target prompt as chat messages, the
response, and the English prompt as chat messages or None (a plain SFT row). A record that cannot be trained on leaves
as a `BadRow`, which `Summary` counts; whether bad rows are skipped or end the run is the caller's choice
(`Summary.check`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cc_ds.data.columns import (
    FORMS,
    Form,
    best_form,
    check_map_is_used,
    english_note,
    find_form,
    missing_columns,
    rename,
    unread_note,
)
from cc_ds.data.sources import Source, open_source

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
NAMED_BAD_ROWS = 20

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Row:
    """One training example. The prompts end in a user turn; the generation prompt is the template's business."""

    prompt: Messages
    response: str
    prompt_en: Messages | None
    """The same prompt in English; None makes this a plain SFT row, without a connection."""
    lang: str
    source: str
    """file:line for jsonl, file:row elsewhere; both count from 1."""
    reasoning_content: str = ""
    """The thoughts that led to the response, where the row has them apart; written by the template's rule."""


@dataclass(frozen=True)
class BadRow:
    """A record that cannot be trained on; `reason` is the same for all rows with the same fault, `detail` is this
    row's."""

    source: str
    reason: str
    detail: str = ""


class LongRow(BadRow):
    """A row left out because it is longer than the limits, where the user asked to skip such rows."""


@dataclass
class Summary:
    """What was read and what became of it. The caller prints `text()`; `check` ends the run where that was asked
    for."""

    rows: int = 0
    rows_with_english: int = 0
    rows_by_lang: dict[str, int] = field(default_factory=dict)
    bad_rows: dict[str, int] = field(default_factory=dict)
    """Number of bad rows by reason."""
    named_bad_rows: list[str] = field(default_factory=list)
    """The first 20 bad rows, each as "source: reason (detail)"."""
    skipped_long: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    english_cut: int = 0
    notes: list[str] = field(default_factory=list)
    """Other things a user would want to know, such as an English column that is probably misspelled."""

    def add_row(self, lang: str, with_english: bool) -> None:
        """Count a row that is kept."""
        self.rows += 1
        self.rows_with_english += with_english
        self.rows_by_lang[lang] = self.rows_by_lang.get(lang, 0) + 1

    def add_bad(self, bad: BadRow) -> None:
        """Count a row that is left out; the first ones are named."""
        if isinstance(bad, LongRow):
            self.skipped_long += 1
            return
        self.bad_rows[bad.reason] = self.bad_rows.get(bad.reason, 0) + 1
        if len(self.named_bad_rows) < NAMED_BAD_ROWS:
            self.named_bad_rows.append(f"{bad.source}: {bad.reason}" + (f" ({bad.detail})" if bad.detail else ""))

    def check(self, on_bad_row: str) -> None:
        """Raise ValueError if no row is left, or if there are bad rows and `on_bad_row` is "error"."""
        if on_bad_row not in ("skip", "error"):
            raise ValueError(f'on_bad_row must be "skip" or "error", not {on_bad_row!r}.')
        if self.bad_rows and on_bad_row == "error":
            raise ValueError(f'{self.text()}\nMend these rows, or leave them out with on_bad_row "skip".')
        if self.rows == 0:
            raise ValueError(f"No row is left to train on.\n{self.text()}")

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """What was read, cut and left out, for a person."""
        langs = ", ".join(f"{lang} {count}" for lang, count in sorted(self.rows_by_lang.items()))
        lines = [f"{self.rows} rows, {self.rows_with_english} of them with English" + (f" ({langs})" if langs else "")]
        if self.prompts_cut or self.responses_cut or self.english_cut or self.skipped_long:
            lines.append(
                f"cut to length: {self.prompts_cut} prompts, {self.responses_cut} responses, {self.english_cut} "
                f"English prompts; left out as too long: {self.skipped_long} rows"
            )
        if self.bad_rows:
            lines.append(f"{sum(self.bad_rows.values())} bad rows:")
            lines += [f"  {count} x {reason}" for reason, count in Counter(self.bad_rows).most_common()]
            lines.append(f"  the first {len(self.named_bad_rows)}:")
            lines += [f"    {named}" for named in self.named_bad_rows]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def to_json(self) -> str:
        """For the cache beside the rows."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """What `to_json` wrote."""
        return cls(**json.loads(text))


def read_rows(
    paths: str | Path | Sequence[str | Path],
    column_map: Mapping[str, str] | None = None,
    on_bad_row: str = "skip",
    split: str | Sequence[str] = "train",
    require_response: bool = True,
) -> tuple[list[Row], Summary]:
    """All good rows of all sources, in order, and the summary.

    `column_map` is {our column name: theirs}. Raises ValueError for an unreadable source, for columns that fit no
    form, and, when `on_bad_row` is "error", for bad rows. `require_response=False` reads prompts alone: the response
    column may be absent or empty, messages may end in a user turn, and a response that is missing is "".
    """
    summary, rows = Summary(), []
    for row in iter_rows(open_sources(paths, split), column_map, summary, require_response):
        if isinstance(row, BadRow):
            summary.add_bad(row)
        else:
            summary.add_row(row.lang, row.prompt_en is not None)
            rows.append(row)
    summary.check(on_bad_row)
    return rows, summary


def open_sources(paths: str | Path | Sequence[str | Path], split: str | Sequence[str] = "train") -> list[Source]:
    """The sources behind one or several paths or data set names. ValueError: none is named, or one can't be opened."""
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    if not paths:
        raise ValueError("No data source is named: give at least one file, folder or data set.")
    return [open_source(path, split) for path in paths]


def iter_rows(
    sources: Sequence[Source],
    column_map: Mapping[str, str] | None = None,
    summary: Summary | None = None,
    require_response: bool = True,
) -> Iterator[Row | BadRow]:
    """Every record of every source as a Row or a BadRow, in order; `summary` receives notes, the last ones at the end.
    Columns are checked first."""
    column_map = dict(column_map or {})
    forms = [find_form(source, column_map, require_response) for source in sources]
    check_map_is_used(sources, column_map)
    if summary is not None:
        summary.notes += [
            note
            for source, form in zip(sources, forms, strict=True)
            for note_of in (english_note, unread_note)
            if (note := note_of(source, form, column_map))
        ]
    lacking: Counter[str] = Counter()
    for source, form in zip(sources, forms, strict=True):
        for number, record in source.records():
            record = rename(record, column_map)
            row = to_row(record, form, f"{source.name}:{number}", require_response)
            if isinstance(row, Row):
                lacking.update(column for column in ("input", "history") if _lacks_english(record, column))
            yield row
    if summary is not None:
        summary.notes += [
            f"{rows} rows have instruction_en and {column}, but no {column}_en: unless instruction_en says it all, "
            "their English prompt lacks the text that it speaks of."
            for column, rows in lacking.items()
        ]


def to_row(record: Mapping[str, Any], form: Form | None, source: str, require_response: bool = True) -> Row | BadRow:
    """Bring one record (our column names) to a Row; `form` says which columns are meant where the record fits none.

    Without a `form`, a record that lacks them all is a bad row that names them.
    """
    columns = [name for name, value in record.items() if value is not None]
    form = best_form(columns, require_response) or form or best_form(list(record), require_response)
    if form is None:
        return BadRow(source, missing_columns(columns, require_response))
    try:
        prompt, answer, prompt_en = _PARSERS[form.required](record, require_response)
        response = answer["content"]
        lang = record.get("lang") or "und"
        if not isinstance(lang, str):
            raise _Bad(f"lang is of type {type(lang).__name__}, not a string")
        if not require_response:
            response = response if isinstance(response, str) else ""
        elif not isinstance(response, str):
            raise _Bad(
                "the response is missing"
                if response is None
                else f"the response is of type {type(response).__name__}, not a string"
            )
        if require_response and not response.strip():
            raise _Bad("the response is empty")
    except _Bad as bad:
        return BadRow(source, bad.reason, bad.detail)
    return Row(prompt, response, prompt_en, lang, source, answer.get("reasoning_content", ""))


class _Bad(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


# The prompt, the answer as {content} or {content, reasoning_content}, the English prompt.
Parsed = tuple[Messages, dict[str, Any], Messages | None]


def _parse_instruction(record: Mapping[str, Any], _: bool) -> Parsed:
    """`system` and `history` come first. A row without `system_en` has its `system` before the English prompt too, as
    one text mostly serves all languages; without `history_en` the English prompt has no earlier turns."""
    prompt = _history(record, "history") + _prompt(_join(record, "instruction", "input"), "prompt")
    prompt_en = None
    if _text(record, "instruction_en"):
        prompt_en = _prompt(_join(record, "instruction_en", "input_en"), "English prompt")
        prompt_en = _with_system(_history(record, "history_en") + prompt_en, record, "system_en", "system")
    return _with_system(prompt, record, "system"), {"content": record.get("output")}, prompt_en


def _lacks_english(record: Mapping[str, Any], column: str) -> bool:
    filled = [bool(str(record.get(name) or "").strip()) for name in ("instruction_en", column, f"{column}_en")]
    return filled == [True, True, False]


def _history(record: Mapping[str, Any], column: str) -> Messages:
    """LLaMA-Factory's [[question, answer], ...] as turns."""
    value = _decoded(record.get(column))
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    turns = []
    for pair in value if isinstance(value, list) else [value]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise _Bad(f"{column} is not a list of [question, answer]")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def _with_system(turns: Messages, record: Mapping[str, Any], *columns: str) -> Messages:
    """The turns after the first system text in `columns`, unless they bring their own."""
    text = next((text for column in columns if (text := _text(record, column))), "")
    if not text or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text}, *turns]


def _decoded(value: Any) -> Any:
    """A list as CSV files carry it: as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _parse_messages(record: Mapping[str, Any], require_response: bool) -> Parsed:
    turns = _messages(record.get("messages"), "prompt")
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not require_response and turns and turns[-1]["role"] != "assistant":
        return _prompt(turns, "prompt"), {"content": None}, _english(record.get("messages_en"))
    if not answers:
        raise _Bad("messages has no assistant turn, so there is no response")
    if answers[-1] != len(turns) - 1:
        raise _Bad("messages goes on after its last assistant turn", f"{len(turns) - 1 - answers[-1]} turns more")
    return _prompt(turns[:-1], "prompt"), turns[-1], _english(record.get("messages_en"))


def _parse_completion(record: Mapping[str, Any], _: bool) -> Parsed:
    answer = {"content": record.get("completion")}
    if isinstance(answer["content"], list) and len(answer["content"]) == 1:
        turn = answer["content"][0]
        if isinstance(turn, dict) and turn.get("role") == "assistant":
            has_text = isinstance(turn.get("content"), str)
            answer = _turn(turn, "completion", 1) if has_text else {"content": turn.get("content")}
    return _prompt(record.get("prompt"), "prompt"), answer, _english(record.get("prompt_en"))


def _parse_conversations(record: Mapping[str, Any], require_response: bool) -> Parsed:
    """ShareGPT's turns, and LLaMA-Factory's `system` column beside them (see `_parse_instruction`)."""
    columns = {"messages": "conversations", "messages_en": "conversations_en"}
    messages = {ours: _from_sharegpt(record.get(theirs)) for ours, theirs in columns.items()}
    prompt, answer, prompt_en = _parse_messages(messages, require_response)
    prompt_en = prompt_en and _with_system(prompt_en, record, "system_en", "system")
    return _with_system(prompt, record, "system"), answer, prompt_en


def _from_sharegpt(value: Any) -> Any:
    """{from, value} as {role, content}; what is neither is left for `_messages` to name."""
    value = _decoded(value)
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "from" in turn for turn in value):
        return value
    return [
        {"role": SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")} for turn in value
    ]


_PARSERS = dict(
    zip(
        (form.required for form in FORMS),
        (_parse_instruction, _parse_messages, _parse_completion, _parse_conversations),
        strict=True,
    )
)


def _text(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if value is not None and not isinstance(value, str):
        raise _Bad(f"{column} is of type {type(value).__name__}, not a string")
    return value if value and value.strip() else ""


def _join(record: Mapping[str, Any], *columns: str) -> str:
    return "\n".join(text for column in columns if (text := _text(record, column)))


def _english(value: Any) -> Messages | None:
    """An English prompt column: None, "" and [] say that there is none; a trailing assistant turn is dropped."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    turns = _messages(value, "English prompt")
    return _prompt(turns[:-1] if turns[-1]["role"] == "assistant" else turns, "English prompt")


def _prompt(value: Any, what: str) -> Messages:
    turns = _messages(value, what)
    if not any(turn["role"] == "user" for turn in turns):
        raise _Bad(f"the {what} is empty" if not turns else f"the {what} has no user turn")
    if turns[-1]["role"] == "assistant":
        raise _Bad(f"the {what} ends in an assistant turn")
    if not turns[-1]["content"].strip():
        raise _Bad(f"the {what} is empty")
    return turns


def _messages(value: Any, what: str) -> Messages:
    """A string (one user turn, or a JSON list as CSV files carry it) or a list of {role, content}, checked turn by
    turn."""
    if isinstance(value, str):
        if not value.strip():
            raise _Bad(f"the {what} is empty")
        decoded = _json_messages(value)
        if decoded is None:
            return [{"role": "user", "content": value}]
        value = decoded
    if value is None:
        raise _Bad(f"the {what} is empty")
    if not isinstance(value, list):
        raise _Bad(f"the {what} is of type {type(value).__name__}, not a string or a list of messages")
    return [_turn(turn, what, index) for index, turn in enumerate(value, start=1)]


def _turn(turn: Any, what: str, index: int) -> dict[str, str]:
    """The turn's role, content and, where it has some, reasoning_content; checked."""
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise _Bad(f"a turn of the {what} is not {{role, content}}", f"turn {index}")
    if turn["role"] not in ROLES:
        raise _Bad(f"the {what} has an unknown role {turn['role']!r} (known: {', '.join(ROLES)})", f"turn {index}")
    thoughts = ("reasoning_content",) if turn.get("reasoning_content") else ()
    for key in ("content", *thoughts):
        if not isinstance(turn[key], str):
            raise _Bad(
                f"a turn's {key} in the {what} is of type {type(turn[key]).__name__}, not a string", f"turn {index}"
            )
    return {key: turn[key] for key in ("role", "content", *thoughts)}


def _json_messages(text: str) -> list | None:
    decoded = _decoded(text) if text.lstrip().startswith("[{") else None
    is_messages = isinstance(decoded, list) and all(isinstance(turn, dict) and "role" in turn for turn in decoded)
    return decoded if is_messages else None
