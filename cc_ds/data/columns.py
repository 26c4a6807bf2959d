"""Which columns hold what: the four forms of a row, a user's column map, and errors that name the nearest spelling.

`find_form` looks once at a source's columns, before any row is read; `rename` then brings each record to our names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cc_ds.data.sources import Source


@dataclass(frozen=True)
class Form:
    """One way to lay out a row: the columns it cannot do without, the English one, and the rest."""

    required: tuple[str, ...]
    english: str
    optional: tuple[str, ...] = ()

    def needed(self, require_response: bool) -> tuple[str, ...]:
        """The columns a row needs; where no response is asked for, the first of `required`, the prompt's."""
        return self.required if require_response else self.required[:1]


FORMS = (
    Form(
        ("instruction", "output"),
        "instruction_en",
        ("input", "input_en", "system", "system_en", "history", "history_en"),
    ),
    Form(("messages",), "messages_en"),
    Form(("prompt", "completion"), "prompt_en"),
    Form(("conversations",), "conversations_en", ("system", "system_en")),
)
# Columns of the field's data sets that some form, or all, would leave unread without a word.
KNOWN_ELSEWHERE = ("system", "history", "tools", "images", "videos", "audios", "chosen", "rejected")
COLUMNS = tuple(
    dict.fromkeys([*(name for form in FORMS for name in (*form.required, form.english, *form.optional)), "lang"])
)


def find_form(source: Source, column_map: Mapping[str, str], require_response: bool = True) -> Form:
    """The form that a source's columns fit, or a ValueError naming the source, its columns, the missing and the
    nearest."""
    for ours in column_map:
        if ours not in COLUMNS:
            raise ValueError(
                f"column_map: {ours!r} is none of our column names.{_nearest(ours, COLUMNS)} They are {list(COLUMNS)}."
            )
    columns = _our_columns(source, column_map)
    form = best_form(columns, require_response)
    if form is not None:
        return form
    raise ValueError(
        f"{source.name}: {missing_columns(columns, require_response, column_map, source.columns)}\n"
        "  Columns of other names are mapped with column_map, {ours: theirs}, in training; elsewhere rename them."
    )


def missing_columns(
    columns: Sequence[str],
    require_response: bool = True,
    column_map: Mapping[str, str] | None = None,
    theirs: Sequence[str] | None = None,
) -> str:
    """What `columns`, which fit no form, lack of the closest one, for a message; `theirs`: the same before the map."""
    theirs = list(columns if theirs is None else theirs)
    closest = max(FORMS, key=lambda form: sum(name in columns for name in form.needed(require_response)))
    missing = [name for name in closest.needed(require_response) if name not in columns]
    hints = "".join(_nearest((column_map or {}).get(name, name), theirs) for name in missing)
    expected = "; or ".join(f"{' + '.join(form.needed(require_response))} (English: {form.english})" for form in FORMS)
    return f"column {', '.join(missing)} is missing.{hints}\n  found: {theirs}\n  expected: {expected}"


def best_form(columns: Sequence[str], require_response: bool = True) -> Form | None:
    """The form whose required columns are all there; of several, one with English before one without, then the
    first."""
    fitting = [form for form in FORMS if set(form.needed(require_response)) <= set(columns)]
    return max(fitting, key=lambda form: form.english in columns, default=None)


def check_map_is_used(sources: Sequence[Source], column_map: Mapping[str, str]) -> None:
    """A mapped column may be absent from some sources (plain SFT ones), but not from all: that is a misspelling."""
    for ours, theirs in column_map.items():
        if not any(theirs in source.columns for source in sources):
            found = {source.name: source.columns for source in sources}
            near = _nearest(theirs, [name for source in sources for name in source.columns])
            raise ValueError(
                f"column_map sends {ours!r} to {theirs!r}, a column that no source has.{near} Found: {found}."
            )


def english_note(source: Source, form: Form, column_map: Mapping[str, str]) -> str | None:
    """A hint where a source has no English column but one spelled nearly so: the rows would silently be plain SFT
    rows."""
    columns = _our_columns(source, column_map)
    if form.english in columns:
        return None
    near = difflib.get_close_matches(form.english, [name for name in columns if name not in COLUMNS], n=1, cutoff=0.8)
    if not near:
        return None
    return (
        f"{source.name} has no column {form.english!r} but {near[0]!r}: "
        "if that is the English prompt, map it with column_map."
    )


def unread_note(source: Source, form: Form, column_map: Mapping[str, str]) -> str | None:
    """The source's columns whose meaning is known but which `form` does not read."""
    unread = [name for name in KNOWN_ELSEWHERE if name in source.columns and name not in form.optional]
    unread = [name for name in unread if name not in column_map.values()]
    return f"{source.name}: not read: the column{'s' * (len(unread) > 1)} {', '.join(unread)}." if unread else None


def without_english(sources: Sequence[Source], column_map: Mapping[str, str]) -> str:
    """For a message: no row of these has English; where it was looked for, and what to do."""
    lines = ["No row has an English prompt, without which CC-Tuning is plain SFT."]
    for source in sources:
        wanted = best_form(_our_columns(source, column_map)).english
        lines.append(f"  {source.name}: looked for in {wanted!r}; found: {source.columns}")
    lines.append(f"  Map the column that holds it (--column_map {wanted}=NAME), or train with --method sft.")
    return "\n".join(lines)


def rename(record: Mapping[str, Any], column_map: Mapping[str, str]) -> dict[str, Any]:
    """The record under our column names. A mapped column that this record lacks leaves our own name as it stands."""
    mapped = {ours: record[theirs] for ours, theirs in column_map.items() if theirs in record}
    return {**record, **mapped}


def _our_columns(source: Source, column_map: Mapping[str, str]) -> list[str]:
    mapped = [ours for ours, theirs in column_map.items() if theirs in source.columns]
    return list(dict.fromkeys([*source.columns, *mapped]))


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Nearest to {name!r}: {near[0]!r}." if near else ""
