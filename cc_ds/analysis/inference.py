"""What the gate picks at inference, and the activations it picks among.

Rendered prompts -> S at the anchors -> S W (or the real E) -> the gate, as `generate` runs it.

Shapes: N prompts, B of a batch, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cc_ds.infer.prompts import length_batches, pad_prompts, progress

if TYPE_CHECKING:
    from cc_ds import CCModelForCausalLM
    from cc_ds.data.templates import RenderedPrompt


@dataclass(frozen=True, slots=True)
class GateChoices:
    """N prompts seen through the connection; float32 on the CPU."""

    choice: Tensor
    """(N, L): the gate's values; one-hot for a hard gate."""
    source: Tensor
    """S, (N, L, H)."""
    mapped: Tensor | None
    """S W, (N, L, H); None where the model has no transform."""
    english: Tensor | None
    """E, (N, L, H); None where no English prompts were given."""


@torch.inference_mode()
def gate_choices(
    model: CCModelForCausalLM,
    prompts: Sequence[RenderedPrompt],
    english: Sequence[RenderedPrompt] | None = None,
    languages: Sequence[str] | None = None,
    pad_id: int = 0,
    batch_size: int = 8,
) -> GateChoices:
    """Run the gate on `prompts`: on S W where the model has a transform, else on the real English prompts.

    ValueError: neither a transform nor English prompts, or a language that the transform does not know.
    """
    if model.transform is None and english is None:
        raise ValueError(
            "the gate needs a model with a Transform Matrix (tools/fit_transform.py) or rows with English prompts"
        )
    parts: dict[str, Tensor] = {}
    with progress(len(prompts), "reading", "prompt") as bar:
        for rows in length_batches([len(prompt.ids) for prompt in prompts], batch_size):
            found = _batch(model, prompts, english, languages, rows, pad_id)
            for name, values in found.items():
                whole = parts.setdefault(name, values.new_zeros(len(prompts), *values.shape[1:]))
                whole[rows] = values
            bar.update(len(rows))
    return GateChoices(parts["choice"], parts["source"], parts.get("mapped"), parts.get("english"))


def _batch(model, prompts, english, languages, rows, pad_id) -> dict[str, Tensor]:
    input_ids, mask, anchors = pad_prompts([prompts[i] for i in rows], pad_id, "right", model.device)
    found_LBH = {"source": model.anchor_activations(input_ids, mask, anchors)}
    if english is not None:
        padded = pad_prompts([english[i] for i in rows], pad_id, "right", model.device)
        found_LBH["english"] = model.anchor_activations(*padded)
    if model.transform is not None:
        names = None if languages is None else [languages[i] for i in rows]
        found_LBH["mapped"] = model.transform(found_LBH["source"], names)
    seen = found_LBH.get("mapped", found_LBH.get("english"))
    model.prefill_pass = model.fuse_pass(seen, anchors, input_ids.shape[1])
    choice = model(input_ids, mask, logits_to_keep=1).choice
    return {"choice": choice.float().cpu()} | {
        name: values.transpose(0, 1).float().cpu() for name, values in found_LBH.items()
    }


def shares(choice: Tensor, labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """Labels in order and, (labels, L), the mean of the gate's values over each label's rows."""
    names = sorted(set(labels))
    rows = [[i for i, label in enumerate(labels) if label == name] for name in names]
    return names, torch.stack([choice[chosen].mean(dim=0) for chosen in rows])


def principal_components(sets: Sequence[Tensor], count: int = 2) -> tuple[list[Tensor], list[float]]:
    """Project sets of vectors, each (n, H), on the first principal components of all of them together.

    Returns:
        Each set's coordinates, (n, count), and the share of the variance that each component carries. A component's
        sign is such that its largest weight is positive, so that a figure is the same wherever it is drawn.
    """
    together = torch.cat(list(sets)).double()
    mean = together.mean(dim=0)
    _, values, directions = torch.linalg.svd(together - mean, full_matrices=False)
    directions, variances = directions[:count], values.square()
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    explained = (variances[:count] / variances.sum().clamp_min(1e-300)).tolist()
    return [((vectors.double() - mean) @ directions.T).float() for vectors in sets], explained
