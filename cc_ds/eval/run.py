"""Run a task through a model and score what it says, by language.

Rows -> dealt to ranks -> rendered prompts -> batches of like length, greedy -> journal -> gathered -> scores. Modes:
    plain      no connection: the model as it is
    transform  connected to English activations approximated by the model's Transform Matrix: how it is deployed; rows
               in English are read plain, as `generate` does when it is told the languages
    english    connected to the row's real English prompt: the upper bound for any transform; rows without one (English
               ones) are read plain
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cc_ds.dist.group import Group
from cc_ds.eval.benchmarks import resource_level
from cc_ds.eval.journal import Answer, Journal
from cc_ds.eval.rows import EvalRow
from cc_ds.eval.statistics import bootstrap_interval
from cc_ds.eval.tasks import Task
from cc_ds.infer.generate import ENGLISH, is_language
from cc_ds.infer.prompts import respond

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import Template

MODES = ("plain", "transform", "english")
_BATCHES_BETWEEN_WRITES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A mean of row scores, and its 95 % bootstrap interval; shares between 0 and 1."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Scores of one language, or of several."""

    rows: int
    """Rows asked."""
    empty: int
    """Answers without any text, counted as wrong and never dropped."""
    metrics: dict[str, Metric]
    """By the names of the task's rules. Of several languages: every language weighs the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """What an evaluation found."""

    task: str
    """Its name."""
    mode: str
    """plain, transform or english."""
    rules: dict[str, str]
    """Name of a score -> the metric that gave it; the first is the headline."""
    macro: Score
    """Mean over all languages."""
    groups: dict[str, Score]
    """Means over "high" and "low"-resource languages (benchmarks.py), where there are any."""
    languages: dict[str, Score]
    """In alphabetical order."""
    seconds: float
    """Time spent generating, loading not included, summed over ranks and over all starts of the run."""
    tokens_in: int
    """Tokens of all prompts, and of the English prompts where they were read."""
    tokens_out: int
    """Tokens generated over all answers, stop tokens included."""
    answers: list[dict[str, Any]] = field(repr=False)
    """Per row: id, item, lang, prompt, answers, response, tokens_in, tokens_out, scores; in the order of the rows."""


def evaluate(
    model: CCModelForCausalLM,
    tokenizer: Any,
    template: Template,
    task: Task,
    mode: str = "transform",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    seed: int = 0,
    group: Group | None = None,
    journal: Journal | None = None,
    exclude: Sequence[str] = ENGLISH,
) -> EvalResult:
    """Ask the task's rows greedily in `mode` and score the answers; `seed` draws the bootstrap.

    Args:
        max_new_tokens: per answer; None: as the task has it.
        group: the ranks that share the work; every rank returns the whole result. None: this process alone.
        journal: where answers are kept as they come, and taken from.
        exclude: in mode transform, rows of these languages are read plain.

    Raises:
        ValueError: an unknown mode, no rows, mode transform without a transform in the model or, of one with a matrix
            per language, without a row's language in it, mode english without any English prompt.
    """
    _check(model, task.rows, mode, exclude)
    group = group or Group.alone()
    settings = {"mode": mode, "max_new_tokens": max_new_tokens or task.max_new_tokens}
    if mode == "transform":
        settings["exclude"] = list(exclude)
    known = {}
    if journal is not None:
        template_settings = {"chat_template": template.chat_template, "stops": sorted(template.stop_token_ids)}
        # One view for all ranks, who deal the rows by it: a file system may show them different files.
        for found in group.gather(journal.open(settings | template_settings, group)):
            known |= found
    rows = {row.id: row for row in task.rows}  # the same question twice is asked once
    open_rows = [row for key, row in rows.items() if key not in known]
    mine = _longest_first(open_rows, template, mode)[group.rank :: group.world_size]
    answered = {}
    model.eval()
    size = batch_size * _BATCHES_BETWEEN_WRITES
    for start in range(0, len(mine), size):
        new = _ask(model, tokenizer, template, mine[start : start + size], batch_size=batch_size, **settings)
        answered |= new
        if journal is not None:
            journal.add(new)
    for other in group.gather(answered):
        known |= other
    return score(task, [known[row.id] for row in task.rows], mode=mode, seed=seed)


def _ask(model, tokenizer, template, prompts, *, mode, batch_size, max_new_tokens, exclude=()) -> dict[str, Answer]:
    """Answers by row id; `prompts` are (row, its rendered prompt, its rendered English prompt or None)."""
    start = time.perf_counter()
    responses = respond(
        model,
        tokenizer,
        template,
        [prompt for _, prompt, _ in prompts],
        english=[twin for _, _, twin in prompts] if mode == "english" else None,
        connect=mode != "plain",
        languages=[row.lang for row, _, _ in prompts] if mode == "transform" else None,
        exclude=exclude,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    seconds = (time.perf_counter() - start) / len(prompts)
    return {
        row.id: Answer(
            text=response.text,
            tokens_in=len(prompt.ids) + (len(twin.ids) if twin else 0),
            tokens_out=response.tokens,
            seconds=seconds,
        )
        for (row, prompt, twin), response in zip(prompts, responses, strict=True)
    }


def _longest_first(rows: Sequence[EvalRow], template: Template, mode: str) -> list[tuple]:
    """(row, prompt, English prompt or None), rendered, longest first: every rank is dealt as much as the others."""
    rendered = [
        (
            row,
            template.render_prompt(row.prompt, row.where),
            template.render_prompt(row.prompt_en, row.where) if mode == "english" and row.prompt_en else None,
        )
        for row in rows
    ]
    return sorted(rendered, key=lambda item: -len(item[1].ids))


def score(task: Task, answers: Sequence[Answer], *, mode: str, seed: int = 0) -> EvalResult:
    """Score answers that were given to the task's rows, in the same order."""
    scored = [
        {
            "id": row.id,
            "item": row.item or row.id,
            "lang": row.lang,
            "prompt": row.prompt[-1]["content"],
            "answers": list(row.answers),
            "response": answer.text,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
            "scores": task.score(row, answer.text),
        }
        for row, answer in zip(task.rows, answers, strict=True)
    ]
    by_lang = {lang: [a for a in scored if a["lang"] == lang] for lang in sorted({row.lang for row in task.rows})}
    levels = {lang: resource_level(lang) for lang in by_lang}
    spent = {row.id: answer for row, answer in zip(task.rows, answers, strict=True)}.values()
    return EvalResult(
        task=task.name,
        mode=mode,
        rules=dict(task.rules),
        macro=_score(by_lang, task, seed),
        groups={
            level: _score({lang: rows for lang, rows in by_lang.items() if levels[lang] == level}, task, seed)
            for level in ("high", "low")
            if level in levels.values()
        },
        languages={lang: _score({lang: rows}, task, seed) for lang, rows in by_lang.items()},
        seconds=sum(answer.seconds for answer in spent),
        tokens_in=sum(answer.tokens_in for answer in spent),
        tokens_out=sum(answer.tokens_out for answer in spent),
        answers=scored,
    )


def _score(groups: Mapping[str, list[dict]], task: Task, seed: int) -> Score:
    """Mean over groups of each group's mean."""
    metrics = {}
    items = {lang: [answer["item"] for answer in group] for lang, group in groups.items()}
    for name in task.rules:
        values = {lang: [answer["scores"][name] for answer in group] for lang, group in groups.items()}
        low, high = bootstrap_interval(values, seed, items=items)
        mean = sum(sum(group) / len(group) for group in values.values()) / len(values)
        metrics[name] = Metric(mean=mean, low=low, high=high)
    rows = [answer for group in groups.values() for answer in group]
    return Score(rows=len(rows), empty=sum(not answer["response"] for answer in rows), metrics=metrics)


def _check(model: CCModelForCausalLM, rows: Sequence[EvalRow], mode: str, exclude: Sequence[str]) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not rows:
        raise ValueError("there are no rows to evaluate")
    if mode == "transform" and model.transform is None:
        raise ValueError(
            "mode transform needs a model with a Transform Matrix: fit one with tools/fit_transform.py, or choose "
            "mode plain"
        )
    if mode == "transform" and model.transform.scope == "per_language":  # now, and not after hours of other rows
        languages = [None if is_language(row.lang, exclude) else row.lang for row in rows]
        model.transform.check_languages(languages, len(rows))
    if mode == "english" and not any(row.prompt_en for row in rows):
        raise ValueError("mode english needs rows with an English prompt (instruction_en, prompt_en or messages_en)")


def write_json(content: EvalResult | dict, path: str | Path, **extra: Any) -> None:
    """Write a result as json, with `extra` keys in front; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = asdict(content) if isinstance(content, EvalResult) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(extra | body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
