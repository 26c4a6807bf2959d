"""The whole fit: rows of parallel prompts in, the model with its Transform Matrix and a report out."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cc_ds.eval.run import write_json
from cc_ds.infer.prompts import pad_token_id
from cc_ds.transform.collect import Activations, PromptPair, collect_activations
from cc_ds.transform.fit import FitResult, fit_transform_result
from cc_ds.transform.report import transform_report
from cc_ds.transform.sample import sample_pairs

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.pairs import Row
    from cc_ds.data.templates import Template


def fit_model(
    model: CCModelForCausalLM,
    tokenizer: Any,
    template: Template,
    rows: Sequence[Row],
    *,
    num_pairs: int = 1000,
    held_out: float = 0.1,
    ridge: float = 0.0,
    per_layer: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    activations_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Fit W on a sample of `rows` and put it into `model` (METHOD, The Transform Matrix).

    Args:
        rows: prompts with their English versions; responses are not read.
        num_pairs: pairs sampled in all, balanced over languages.
        held_out: share of them that the fit does not see and is judged on; no English prompt is on both sides.
        ridge: relative to the mean diagonal of S^T S.
        per_layer: one matrix per layer (L, H, H) instead of one for all (H, H).
        activations_folder: keep the collected activations there.

    Returns:
        {"fit": rank, residuals and sizes, "held_out": the report of `transform_report`, or None}, ready for json.
    """
    fit, judged = sample_pairs(rows, num_pairs, held_out, seed)
    pairs = [
        PromptPair(
            pair_id=index,
            lang=rows[index].lang,
            source=template.render_prompt(rows[index].prompt),
            target=template.render_prompt(rows[index].prompt_en),
        )
        for index in fit + judged
    ]
    with tempfile.TemporaryDirectory() as scratch:
        activations = collect_activations(
            model, pairs, activations_folder or scratch, pad_id=pad_token_id(tokenizer), batch_size=batch_size
        )
    fitted_on = activations.select(fit)
    result = fit_transform_result(fitted_on.source, fitted_on.target, ridge=ridge, per_layer=per_layer)
    model.set_transform(result.transform)
    numbers = asdict(result)
    del numbers["transform"]
    report = _judge(result, fitted_on, activations.select(judged)) if judged else None
    return {"fit": {"pairs": len(fit), **numbers}, "held_out": report}


def save_fitted(model: CCModelForCausalLM, tokenizer: Any, result: dict[str, Any], folder: str | Path) -> None:
    """The model with its matrix, its tokenizer, and how well the matrix fits (transform_report.json)."""
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(result, folder / "transform_report.json")


def _judge(result: FitResult, fitted_on: Activations, held_out: Activations) -> dict[str, Any]:
    return transform_report(
        held_out.source,
        held_out.target,
        result.transform,
        held_out.langs,
        held_out.english_id,
        mean_target=fitted_on.target.float().mean(dim=0),
    )
