"""Run a task through a model and score what it says, by language.

Rows -> rendered prompts -> batches of like length, greedy -> scores -> table and json. Three modes:
    plain      no connection: the model as it is
    transform  connected to English activations approximated by the model's Transform Matrix: how it is deployed
    english    connected to the row's real English prompt: the upper bound for any transform; rows without one (English
               ones) are read plain
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cc_ds.eval.metrics import bootstrap_interval, exact_match, inclusion
from cc_ds.eval.tasks import EvalRow
from cc_ds.infer.prompts import Response, respond

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import Template

MODES = ("plain", "transform", "english")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Scores of one language, or of all; shares between 0 and 1."""

    rows: int
    """Rows asked."""
    exact_match: float
    """Share of answers equal to an accepted one after normalisation; an empty answer counts as wrong."""
    exact_match_interval: tuple[float, float]
    """95 % bootstrap interval of it."""
    inclusion: float
    """Share of answers that contain an accepted one."""
    inclusion_interval: tuple[float, float]
    """95 % bootstrap interval of it."""
    empty: int
    """Answers without any text, counted as wrong and never dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """What an evaluation found. The scores of `macro` are the mean over languages; its rows and empty are sums."""

    mode: str
    """plain, transform or english."""
    macro: Score
    """Every language weighs the same."""
    languages: dict[str, Score]
    """In alphabetical order."""
    seconds: float
    """Wall time of generation, loading not included."""
    generated_tokens: int
    """Over all answers, stop tokens included."""
    answers: list[dict[str, Any]] = field(repr=False)
    """Per row: lang, prompt, answers, response, exact_match, inclusion; in the order of the rows."""


def evaluate(
    model: CCModelForCausalLM,
    tokenizer: Any,
    template: Template,
    rows: Sequence[EvalRow],
    mode: str = "transform",
    batch_size: int = 8,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> EvalResult:
    """Ask `rows` greedily in `mode` and score the answers; `seed` draws the bootstrap.

    ValueError: an unknown mode, no rows, mode transform without a transform in the model, mode english without any
    English prompt.
    """
    _check(model, rows, mode)
    prompts = [template.render_prompt(row.prompt) for row in rows]
    english = None
    if mode == "english":
        english = [template.render_prompt(row.prompt_en) if row.prompt_en else None for row in rows]
    model.eval()
    start = time.perf_counter()
    responses = respond(
        model,
        tokenizer,
        template,
        prompts,
        english=english,
        connect=mode != "plain",
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    return score(rows, responses, mode=mode, seconds=time.perf_counter() - start, seed=seed)


def score(
    rows: Sequence[EvalRow], responses: Sequence[Response], *, mode: str, seconds: float, seed: int = 0
) -> EvalResult:
    """Score responses that were given to `rows`, in the same order."""
    answers = [
        {
            "lang": row.lang,
            "prompt": row.prompt[-1]["content"],
            "answers": list(row.answers),
            "response": response.text,
            "exact_match": exact_match(response.text, row.answers),
            "inclusion": inclusion(response.text, row.answers),
        }
        for row, response in zip(rows, responses, strict=True)
    ]
    by_lang = {lang: [a for a in answers if a["lang"] == lang] for lang in sorted({row.lang for row in rows})}
    return EvalResult(
        mode=mode,
        macro=_score(by_lang, seed),
        languages={lang: _score({lang: group}, seed) for lang, group in by_lang.items()},
        seconds=seconds,
        generated_tokens=sum(response.tokens for response in responses),
        answers=answers,
    )


def _score(groups: dict[str, list[dict]], seed: int) -> Score:
    """Mean over groups of each group's share."""
    scores: dict[str, Any] = {}
    for metric in ("exact_match", "inclusion"):
        values = {lang: [float(answer[metric]) for answer in group] for lang, group in groups.items()}
        scores[metric] = sum(sum(v) / len(v) for v in values.values()) / len(values)
        scores[f"{metric}_interval"] = bootstrap_interval(values, seed=seed)
    everything = [answer for group in groups.values() for answer in group]
    return Score(rows=len(everything), empty=sum(not answer["response"] for answer in everything), **scores)


def _check(model: CCModelForCausalLM, rows: Sequence[EvalRow], mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not rows:
        raise ValueError("there are no rows to evaluate")
    if mode == "transform" and model.transform is None:
        raise ValueError(
            "mode transform needs a model with a Transform Matrix: fit one with tools/fit_transform.py, or choose "
            "mode plain"
        )
    if mode == "english" and not any(row.prompt_en for row in rows):
        raise ValueError("mode english needs rows with an English prompt (instruction_en, prompt_en or messages_en)")


def format_table(result: EvalResult) -> str:
    """The result as text: one line per language, then the macro average."""
    lines = [f"{'language':<10}{'rows':>6}{'exact match':>13}{'95 %':>17}{'inclusion':>11}{'95 %':>17}{'empty':>7}"]
    for lang, s in {**result.languages, "macro": result.macro}.items():
        (a, b), (c, d) = s.exact_match_interval, s.inclusion_interval
        lines.append(
            f"{lang:<10}{s.rows:>6}{s.exact_match:>13.3f}{f'[{a:.3f}, {b:.3f}]':>17}"
            f"{s.inclusion:>11.3f}{f'[{c:.3f}, {d:.3f}]':>17}{s.empty:>7}"
        )
    rate = result.generated_tokens / result.seconds if result.seconds > 0 else float("nan")
    lines.append(
        f"mode {result.mode}: {result.generated_tokens} tokens in {result.seconds:.1f} s ({rate:.1f} tokens/s)"
    )
    return "\n".join(lines)


def write_json(content: EvalResult | dict, path: str | Path, **extra: Any) -> None:
    """Write a result as json, with `extra` keys in front; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = asdict(content) if isinstance(content, EvalResult) else content
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(extra | body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
