"""Fit a tuned model's matrices and ask it everything: one run's result.json.

    python experiments/measure.py --model experiments_output/runs/gemma/cc-seed1 --data experiments_output/data \
        --method cc --output result.json

Matrices are fitted on NTREX prompts: one for all layers, without a ridge (the paper's), and one per layer with the
ridge of RIDGES that does best on pairs held out; and one for all layers on prompts of the training rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from cc_ds import cli
from cc_ds.data.pairs import read_rows
from cc_ds.eval.run import write_json
from cc_ds.transform.fit import fit_transform
from cc_ds.transform.sample import sample_pairs
from experiments.ask import Question, ask, correct, read_anchors

RIDGES = (0.01, 0.1, 1.0)
SHARES = {"pairs.jsonl": 1, "train.jsonl": 2}
"""Of each file so many times --pairs are read."""
HELD_OUT = 0.1


def main(argv: list[str] | None = None) -> None:
    """Fit the matrices of a trained arm, ask it in every mode, and write result.json."""
    parser = cli.tool_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument("--method", choices=("cc", "sft"), required=True)
    parser.add_argument(
        "--pairs", type=cli.positive, default=500, help="NTREX pairs to read for matrices; of rows twice as many"
    )
    parser.add_argument("--without", nargs="*", default=[], metavar="LANG", help="languages not to ask in")
    parser.add_argument("--every", type=cli.positive, default=1, help="ask one item in so many (default 1: all)")
    parser.add_argument("--output", type=Path, required=True, help="json file for the result")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, _, template = cli.load_model(args)
    transforms, fits = {}, None
    if args.method == "cc":
        trained = model.transform
        general, rows = (
            read_pairs(model, template, args.data / name, share * args.pairs, args.batch_size, args.seed)
            for name, share in SHARES.items()
        )
        transforms, fits = fit_matrices(general, rows)
        if trained is not None:  # CCConfig.transform_share
            transforms["trained"] = trained.matrix
    tasks = {}
    for path in sorted((args.data / "ask").glob("*.jsonl")):
        questions = read_questions(path, args.without, args.every)
        answers = ask(model, template, questions, transforms, args.batch_size, args.seed)
        tasks[path.stem] = {"correct": correct(questions, answers), "given": _given(answers)}
    result = {"tasks": tasks, "fit": fits, "measure_cpu_seconds": time.process_time()}
    write_json(result | {"training": _training(Path(args.model))}, args.output)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Activations of prompt pairs; those held out share no English prompt with those to fit on."""

    source: Tensor
    """S, (N, L, H)."""
    target: Tensor
    """E, (N, L, H)."""
    known: int
    """How many to fit on; the others are held out."""

    @property
    def fit(self) -> tuple[Tensor, Tensor]:
        """S and E to fit on."""
        return self.source[: self.known], self.target[: self.known]

    def error(self, transform: Tensor | None, constant: Tensor | None = None) -> float:
        """|S W - E| / |E| on the pairs held out; without W, of S itself or of a constant prediction."""
        source, target = self.source[self.known :], self.target[self.known :]
        prediction = source if constant is None else constant
        if transform is not None:
            prediction = (source.transpose(0, 1) @ transform).transpose(0, 1)
        return float((prediction - target).norm() / target.norm())


@torch.no_grad()
def read_pairs(model, template, path: Path, count: int, batch_size: int, seed: int) -> Pairs:
    """Read `count` pairs of a file of rows, HELD_OUT of them to be held out."""
    rows, _ = read_rows([path], require_response=False)
    fit, held_out = sample_pairs(rows, count, HELD_OUT, seed)
    chosen = [rows[index] for index in fit + held_out]
    both = (
        read_anchors(model, [template.render_prompt(getattr(row, side)) for row in chosen], batch_size)
        for side in ("prompt", "prompt_en")
    )
    return Pairs(*both, known=len(fit))


def fit_matrices(general: Pairs, rows: Pairs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The matrices by mode (ask.py), and relative errors on pairs held out.

    Args:
        general: of other texts (NTREX).
        rows: of the training rows, which have an English prompt each by themselves.
    """
    matrices = {"matrix": fit_transform(*general.fit)}
    errors = {"identity": general.error(None), "mean English": general.error(None, general.fit[1].mean(dim=0))}
    errors["matrix"] = general.error(matrices["matrix"])
    per_layer = {ridge: fit_transform(*general.fit, ridge=ridge, per_layer=True) for ridge in RIDGES}
    found = {ridge: general.error(transform) for ridge, transform in per_layer.items()}
    errors |= {f"per-layer, ridge {ridge}": error for ridge, error in found.items()}
    matrices["per-layer"] = per_layer[min(found, key=found.get)]
    matrices["rows"] = fit_transform(*rows.fit)
    errors["rows: mean English"] = rows.error(None, rows.fit[1].mean(dim=0))
    errors |= {f"rows: {mode}": rows.error(matrices[mode]) for mode in ("matrix", "rows")}
    return matrices, errors


def read_questions(path: Path, without: Sequence[str] = (), every: int = 1) -> list[Question]:
    """The questions of a file that prepare_data.py wrote: one item in `every`, in all languages but those `without`."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = (row for row in rows if row["item"] % every == 0 and row["lang"] not in without)
    return [Question(**row | {"options": tuple(row["options"])}) for row in kept]


def _given(answers: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """How often each option was given, by mode: a model that gives one alone is seen here."""
    return {mode: dict(sorted(Counter(given).items())) for mode, given in answers.items()}


def _training(run: Path) -> dict[str, Any]:
    """What metrics.jsonl says of the training: the loss, what the gate did, and its layers by language."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = {line["step"]: line for line in lines if "loss" in line}  # a step taken again after a kill stands twice
    kept = ("step", "loss", "gate_entropy", "fusion_ratio", "tokens_per_second", "chosen_layers")
    return {"lines": [{key: line[key] for key in kept if key in line} for line in steps.values()]}


if __name__ == "__main__":
    cli.run(main)
