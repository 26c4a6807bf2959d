"""The whole fit: rows of parallel prompts in, the model with its Transform Matrix and a report out."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cc_ds.data.templates import TemplateRejects
from cc_ds.dist.group import Group
from cc_ds.dist.patience import main_first
from cc_ds.dist.zero import full_state_dict
from cc_ds.eval.run import write_json
from cc_ds.infer.prompts import pad_token_id
from cc_ds.transform.collect import PromptPair, collect_activations
from cc_ds.transform.figures import plot_report
from cc_ds.transform.fit import FitResult, fit_problems
from cc_ds.transform.report import transform_report
from cc_ds.transform.sample import sample_pairs, split_by_english
from cc_ds.transform.shards import load_activations, mean_target, shard_problems
from cc_ds.transform.solve import singular_values

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.pairs import Row
    from cc_ds.data.templates import Template

log = logging.getLogger(__name__)

# Of the pairs fitted, to choose the ridge on; W is then fitted on all of them.
_CHOOSING_SHARE = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class FitOptions:
    """What a fit can be asked for."""

    num_pairs: int = 1000
    """Pairs sampled in all, balanced over languages."""
    held_out: float = 0.1
    """Share of them that the fit does not see and is judged on; no English prompt is on both sides."""
    ridge: float | str = "auto"
    """Relative to the mean diagonal of S^T S; "auto": the best on a fifth of the fitted pairs, then all are fitted."""
    scope: str = "shared"
    """shared, per_layer or per_language."""
    rank: int | None = None
    """W as two factors of this rank; None: whole."""
    batch_size: int = 8
    """Prompts read at once."""
    seed: int = 0
    """Of the sample and the splits."""
    activations: str | Path | None = None
    """Keep the collected activations there, or go on with those of a stopped run; None: a temporary folder."""
    pairs_per_shard: int = 256
    """What a stopped run loses at most, and what is held in memory at once."""


def fit_model(
    model: CCModelForCausalLM,
    tokenizer: Any,
    template: Template,
    rows: Sequence[Row],
    options: FitOptions | None = None,
    group: Group | None = None,
) -> dict[str, Any]:
    """Fit W on a sample of `rows` and put it into `model` (METHOD, The Transform Matrix).

    Args:
        rows: prompts with their English versions; responses are not read.
        group: every rank of it must call this, with the same rows.

    Returns:
        {"fit": ranks, ridges, residuals and sizes, "held_out": the report of `transform_report`, or None}, ready for
        json.
    """
    options, group = options or FitOptions(), group or Group.alone()
    fit, judged = sample_pairs(rows, options.num_pairs, options.held_out, options.seed)
    pairs = render_pairs(template, rows, fit + judged)
    fit, judged = ([index for index in side if index in pairs] for side in (fit, judged))
    if not fit:
        raise ValueError("the chat template rejects every pair to fit on: fit on more pairs (--num_pairs)")
    share = _CHOOSING_SHARE if options.ridge == "auto" else 0.0
    train, choosing = split_by_english(rows, fit, share, random.Random(options.seed))
    if not train:
        train, choosing = choosing, []
    with tempfile.TemporaryDirectory() if options.activations is None else nullcontext() as scratch:
        # A temporary folder must be one that all ranks see: rank 0's.
        folder = group.main_only(lambda: str(options.activations or scratch))
        pad_id = pad_token_id(tokenizer)
        collect_activations(
            model,
            list(pairs.values()),
            folder,
            pad_id,
            options.batch_size,
            pairs_per_shard=options.pairs_per_shard,
            group=group,
        )
        result = fit_problems(
            shard_problems(folder, options.scope, set(train), set(choosing), group),
            model.config.hidden_size,
            options.scope,
            ridge=options.ridge,
            rank=options.rank,
            dtype=torch.promote_types(model.dtype, torch.float32),
            device=model.device,
            group=group,
        )
        report = _judge(result, folder, fit, judged) if judged else None
        group.barrier()  # nobody's folder goes while another rank reads in it
    model.set_transform(result.transform)
    return {"fit": {"pairs": len(fit), **_numbers(result)}, "held_out": report}


def render_pairs(template: Template, rows: Sequence[Row], chosen: Sequence[int]) -> dict[int, PromptPair]:
    """The chosen rows by index, without those that the chat template refuses: training leaves them out as well.

    ValueError: it refuses all.
    """
    pairs, refused = {}, []
    for index in chosen:
        row = rows[index]
        try:
            source, target = (template.render_prompt(side, row.source) for side in (row.prompt, row.prompt_en))
        except TemplateRejects as error:
            refused.append(error)
            continue
        pairs[index] = PromptPair(pair_id=index, lang=row.lang, source=source, target=target)
    if not pairs:
        raise ValueError(f"no pair can be read; the first: {refused[0]}")
    if refused:
        log.warning("%d of %d pairs left out; the first: %s", len(refused), len(chosen), refused[0])
    return pairs


def save_fitted(
    model: CCModelForCausalLM, tokenizer: Any, result: dict[str, Any], folder: str | Path, group: Group | None = None
) -> None:
    """The model with its matrix, its tokenizer, how well the matrix fits (transform_report.json), and figures of it.

    Every rank must call it; rank 0 writes.
    """
    folder, group = Path(folder), group or Group.alone()
    state_dict = full_state_dict(model, keep=group.is_main)
    with main_first(group, "saving the model"):
        if group.is_main:
            model.save_pretrained(folder, state_dict=state_dict)
            tokenizer.save_pretrained(folder)
            write_json(result, folder / "transform_report.json")
            plot_report(result, folder / "figures")
    group.barrier()  # rank 0, which may hold the store, does not leave while another still looks into it


def _numbers(result: FitResult) -> dict[str, Any]:
    transform = result.transform
    numbers = {
        name: getattr(result, name)
        for name in ("problems", "rows", "hidden_size", "rank", "condition", "relative_error", "ridge")
    }
    each = transform.factors if transform.scope != "shared" else [factor[None] for factor in transform.factors]
    return {
        "scope": transform.scope,
        "low_rank": transform.rank,
        **numbers,
        "ridge_paths": [asdict(path) for path in result.paths],
        "singular_values": [_spectrum(*factors) for factors in zip(*each, strict=True)],
    }


def _spectrum(*factors: Tensor) -> list[float]:
    """The singular values of one matrix, whole or as two factors; float64 copies are made of this one alone."""
    matrix = factors[0].double() if len(factors) == 1 else factors[0].double() @ factors[1].double()
    return singular_values(matrix.T @ matrix).tolist()


def _judge(result: FitResult, folder: str | Path, fitted: Sequence[int], judged: Sequence[int]) -> dict[str, Any]:
    held_out = load_activations(folder, judged)
    return transform_report(
        held_out.source,
        held_out.target,
        result.transform.cpu(),
        held_out.langs,
        held_out.english_id,
        mean_target=mean_target(folder, set(fitted)).float(),
    )
