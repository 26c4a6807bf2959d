"""What the gate picked while a model was trained, from the run's metrics.jsonl.

Shapes: P points in time (log lines), L layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class GateHistory:
    """Counts of chosen layers over a run."""

    steps: list[int]
    """P optimiser steps, ascending."""
    counts: dict[str, Tensor]
    """By language, (P, L): rows whose gate chose each layer since the previous point."""
    entropy: list[float]
    """P mean entropies of the gate's distribution, in nats."""


def gate_history(path: str | Path) -> GateHistory:
    """Read metrics.jsonl, or the run's folder. Steps that a resumed run repeated count as it repeated them.

    ValueError: no such file, a broken line, or no line with a gate (plain SFT).
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name a run's output_dir or its metrics.jsonl")
    points: dict[int, dict] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: broken JSON ({error}); delete the line") from error
        if values.get("chosen_layers"):
            points[values["step"]] = values
    if not points:
        raise ValueError(f"{path}: no line says what the gate chose; was the run plain SFT?")
    steps = sorted(points)
    languages = sorted({lang for values in points.values() for lang in values["chosen_layers"]})
    layers = len(next(iter(points[steps[0]]["chosen_layers"].values())))
    counts = {
        lang: torch.tensor([points[step]["chosen_layers"].get(lang, [0.0] * layers) for step in steps])
        for lang in languages
    }
    return GateHistory(steps, counts, [points[step].get("gate_entropy", float("nan")) for step in steps])
