"""Fit a model's Transform Matrix on parallel prompts, judge it on pairs it has not seen, and save the model with it.

    python tools/fit_transform.py --model runs/demo/model --data pairs.jsonl --output runs/demo/model_with_transform

Rows need a prompt and its English version (instruction and instruction_en, prompt and prompt_en, or messages and
messages_en); responses are not read. The sample is balanced over languages; the share held out has no English prompt
in common with the rest. Prints the report and writes it to OUTPUT/transform_report.json, with figures beside it.

    torchrun --nproc_per_node 8 tools/fit_transform.py ... --deepspeed ds_configs/zero3.json --activations shared/folder

deals the prompts over ranks; with --deepspeed, a model that one GPU does not hold is partitioned over them. A run that
was stopped goes on from the shards in --activations.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.connection.transform import SCOPES
from cc_ds.data.pairs import Row, read_rows
from cc_ds.dist.group import Group, group_left_after, start_group
from cc_ds.transform.report import format_report
from cc_ds.transform.run import FitOptions, fit_model, save_fitted


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.tool_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="file(s) of parallel prompts")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model with its transform")
    parser.add_argument("--num_pairs", type=cli.positive, default=1000, help="pairs sampled in all (default 1000)")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of them to judge the fit on (default 0.1)")
    parser.add_argument(
        "--ridge", type=ridge, default="auto", help="relative to the mean diagonal of S^T S, or auto (default)"
    )
    parser.add_argument("--scope", choices=SCOPES, default="shared", help="what has a matrix of its own")
    parser.add_argument("--rank", type=cli.positive, help="keep W as two factors of this rank (default: whole)")
    parser.add_argument("--activations", type=Path, help="keep the activations there, or go on with a stopped run's")
    parser.add_argument("--pairs_per_shard", type=cli.positive, default=256, help="pairs written at once (default 256)")
    parser.add_argument("--deepspeed", help="a ZeRO-3 file: partition a model that one device does not hold")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the pairs and fit."""
    args = parse(argv)
    if args.output.resolve() == Path(args.model).resolve():
        raise ValueError("--output must be another folder than --model: the weights there are in use")
    if args.deepspeed and "RANK" not in os.environ:
        raise ValueError("--deepspeed partitions the model over ranks: start with deepspeed, torchrun or srun")
    rows, summary = read_rows(args.data, require_response=False)
    group = start_group() if "RANK" in os.environ else Group.alone()
    if group.is_main:
        cli.report_rows(summary)
    with group_left_after():
        fit(args, rows, group)


def fit(args: argparse.Namespace, rows: list[Row], group: Group) -> None:
    """Fit on these rows, report, and save the model with its matrix; every rank must call it."""
    if group.world_size > 1 and args.device is None:
        args.device = str(group.device)
    model, tokenizer, template = cli.load_model(args)
    cli.check_gate(model, args.model)
    names = ("num_pairs", "held_out", "ridge", "scope", "rank", "batch_size", "seed", "activations", "pairs_per_shard")
    options = FitOptions(**{name: getattr(args, name) for name in names})
    result = fit_model(model, tokenizer, template, rows, options, group)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    save_fitted(model, tokenizer, {"settings": settings, **result}, args.output, group)
    if group.is_main:
        report = result["held_out"]
        print(format_report(report) if report else "Nothing was held out: nothing is known of the fit on other pairs.")
        chosen = ", ".join(f"{value:g}" for value in result["fit"]["ridge"])
        print(f"\nRidge {chosen}. Saved the model with its transform to {args.output}, with figures")


def ridge(text: str) -> float | str:
    """auto, or a number of at least 0."""
    return text if text == "auto" else float(text)


if __name__ == "__main__":
    cli.run(main)
