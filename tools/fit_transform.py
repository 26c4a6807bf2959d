"""Fit a model's Transform Matrix on parallel prompts, judge it on pairs it has not seen, and save the model with it.

    python tools/fit_transform.py --model runs/demo/model --data pairs.jsonl --output runs/demo/model_with_transform

Rows need a prompt and its English version (instruction and instruction_en, prompt and prompt_en, or messages and
messages_en); responses are not read. The sample is balanced over languages; the share held out has no English prompt
in common with the rest. Prints the report and writes it to OUTPUT/transform_report.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.data.pairs import read_rows
from cc_ds.transform.report import format_report
from cc_ds.transform.run import fit_model, save_fitted


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.tool_parser(__doc__)
    parser.add_argument("--data", required=True, nargs="+", help="file(s) of parallel prompts")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model with its transform")
    parser.add_argument("--num_pairs", type=cli.positive, default=1000, help="pairs sampled in all (default 1000)")
    parser.add_argument("--held_out", type=float, default=0.1, help="share of them to judge the fit on (default 0.1)")
    parser.add_argument("--ridge", type=float, default=0.0, help="relative to the mean diagonal of S^T S (default 0)")
    parser.add_argument("--per_layer", action="store_true", help="one matrix per layer instead of one for all")
    parser.add_argument("--activations", type=Path, help="keep the collected activations in this (empty) folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.output.resolve() == Path(args.model).resolve():
        raise ValueError("--output must be another folder than --model: the weights there are in use")
    rows, _ = read_rows(args.data, require_response=False)
    model, tokenizer, template = cli.load_model(args)
    result = fit_model(
        model,
        tokenizer,
        template,
        rows,
        num_pairs=args.num_pairs,
        held_out=args.held_out,
        ridge=args.ridge,
        per_layer=args.per_layer,
        batch_size=args.batch_size,
        seed=args.seed,
        activations_folder=args.activations,
    )
    report = result["held_out"]
    print(
        format_report(report) if report else "Nothing was held out, so nothing is known about the fit on other pairs."
    )
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    save_fitted(model, tokenizer, {"settings": settings, **result}, args.output)
    print(f"\nSaved the model with its transform to {args.output}")


if __name__ == "__main__":
    cli.run(main)
