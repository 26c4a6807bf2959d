"""Fit a tuned model's matrices and ask it everything: one run's result.json.

    python experiments/measure.py --model experiments_output/runs/gemma/cc-seed1 --data experiments_output/data \
        --method cc --output result.json

Matrices are fitted on NTREX prompts: one for all layers, without a ridge (the paper's), and one per layer with the
ridge of RIDGES that does best on pairs held out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from cc_ds import cli
from cc_ds.data.pairs import read_rows
from cc_ds.eval.run import write_json
from cc_ds.transform.collect import anchor_activations
from cc_ds.transform.fit import fit_transform
from cc_ds.transform.sample import sample_pairs
from experiments.ask import Question, ask, correct

RIDGES = (0.01, 0.1, 1.0)
PAIRS, HELD_OUT = 500, 0.1


def main(argv: list[str] | None = None) -> None:
    """Fit the matrices of a trained arm, ask it in every mode, and write result.json."""
    parser = cli.tool_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="what prepare_data.py wrote")
    parser.add_argument("--method", choices=("cc", "sft"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="json file for the result")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, _, template = cli.load_model(args)
    transforms, fits = {}, None
    if args.method == "cc":
        trained = model.transform
        transforms, fits = fit_matrices(model, template, args.data / "pairs.jsonl", args.batch_size, args.seed)
        if trained is not None:  # CCConfig.transform_share
            transforms["trained"] = trained.matrix
    tasks = {}
    for path in sorted((args.data / "ask").glob("*.jsonl")):
        questions = read_questions(path)
        answers = ask(model, template, questions, transforms, args.batch_size, args.seed)
        tasks[path.stem] = {"correct": correct(questions, answers), "given": _given(answers)}
    result = {"tasks": tasks, "fit": fits, "measure_cpu_seconds": time.process_time()}
    write_json(result | {"training": _training(Path(args.model))}, args.output)


@torch.no_grad()
def fit_matrices(model, template, path: Path, batch_size: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({"matrix": (H, H), "per-layer": (L, H, H)}, their relative errors |S W - E| / |E| on pairs held out)."""
    rows, _ = read_rows([path], require_response=False)
    fit, held_out = sample_pairs(rows, PAIRS, HELD_OUT, seed)
    source, target = (
        anchor_activations(model, [template.render_prompt(getattr(rows[i], side)) for i in fit + held_out],
                           batch_size=batch_size)
        for side in ("prompt", "prompt_en")
    )  # fmt: skip
    known, judged = slice(0, len(fit)), slice(len(fit), None)

    def error(prediction: Tensor) -> float:
        return float((prediction - target[judged]).norm() / target[judged].norm())

    matrix = fit_transform(source[known], target[known])
    errors = {"identity": error(source[judged]), "mean English": error(target[known].mean(dim=0))}
    errors["matrix"] = error(source[judged] @ matrix)
    best = None
    for ridge in RIDGES:
        per_layer = fit_transform(source[known], target[known], ridge=ridge, per_layer=True)
        found = error(torch.einsum("nlh,lhk->nlk", source[judged], per_layer))
        errors[f"per-layer, ridge {ridge}"] = found
        if best is None or found < best[0]:
            best = found, per_layer
    return {"matrix": matrix, "per-layer": best[1]}, errors


def read_questions(path: Path) -> list[Question]:
    """The questions of a file that prepare_data.py wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Question(**row | {"options": tuple(row["options"])}) for row in rows]


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
