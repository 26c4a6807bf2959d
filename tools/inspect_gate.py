"""Which layers the gate picks, over training and at inference, by language and task; and where S, S W and E lie.

    python tools/inspect_gate.py --run runs/demo/model --output figures
    python tools/inspect_gate.py --model runs/demo/model_with_transform --data pairs.jsonl xnli.jsonl --output figures

--run reads a run's metrics.jsonl: heat maps of layer against step and the gate's entropy. --model and --data run the
gate on prompts: heat maps by language and by file (a file is a task), and the activations of one layer in the plane of
their principal components; E where the rows carry English prompts. Rows in English are left out, as inference reads
them without the connection. Figures are png; the numbers go to gate.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.analysis import figures
from cc_ds.analysis.inference import GateChoices, gate_choices, principal_components, shares
from cc_ds.analysis.training import gate_history
from cc_ds.data.pairs import Row, read_rows
from cc_ds.eval.run import write_json
from cc_ds.infer.generate import ENGLISH, is_language
from cc_ds.infer.prompts import pad_token_id


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.tool_parser(__doc__, model_required=False)
    parser.add_argument("--run", type=Path, help="output_dir of a training run, or its metrics.jsonl")
    parser.add_argument("--data", nargs="+", help="file(s) of prompts for --model")
    parser.add_argument(
        "--exclude", nargs="*", default=list(ENGLISH), help="languages whose rows are left out (default: English)"
    )
    parser.add_argument("--layer", type=int, help="whose activations are drawn (default: the one chosen most)")
    parser.add_argument("--limit", type=cli.positive, default=200, help="rows read of each file (default 200)")
    parser.add_argument("--output", required=True, type=Path, help="folder for the figures and gate.json")
    args = parser.parse_args(argv)
    if not args.run and not args.model:
        parser.error("name a --run, or a --model with --data, or both")
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    return args


def main(argv: list[str] | None = None) -> None:
    """Draw what was asked for and write gate.json."""
    args = parse(argv)
    numbers: dict[str, Any] = {}
    if args.run:
        history = gate_history(args.run)
        args.output.mkdir(parents=True, exist_ok=True)
        figures.plot_history(history, args.output / "gate_over_training.png")
        figures.plot_entropy(history, args.output / "gate_entropy.png")
        counts = {lang: values.tolist() for lang, values in history.counts.items()}
        numbers["training"] = {"steps": history.steps, "counts": counts, "entropy": history.entropy}
    if args.model:
        numbers["inference"] = inspect_inference(args)
    write_json(numbers, args.output / "gate.json")
    print(f"Figures and gate.json are in {args.output}")


def inspect_inference(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of the gate's choices by language and task on these prompts; the same numbers, for gate.json.

    Raises:
        ValueError: a layer that the model does not have, or no rows but excluded ones.
    """
    rows: list[Row] = []
    tasks: list[str] = []
    for file in args.data:
        found, summary = read_rows([file], require_response=False)
        cli.report_rows(summary)
        found = [row for row in found if not is_language(row.lang, args.exclude)][: args.limit]
        rows += found
        tasks += [Path(file).stem] * len(found)
    if not rows:
        raise ValueError(f"{', '.join(args.data)}: every row is in a language of --exclude ({', '.join(args.exclude)})")
    model, tokenizer, template = cli.load_model(args)
    cli.check_gate(model, args.model)
    english = None
    if all(row.prompt_en for row in rows):
        english = [template.render_prompt(row.prompt_en, row.source) for row in rows]
    languages = [row.lang for row in rows]
    prompts = [template.render_prompt(row.prompt, row.source) for row in rows]
    seen = gate_choices(model, prompts, english, languages, pad_token_id(tokenizer), args.batch_size)
    layer = int(seen.choice.mean(dim=0).argmax()) if args.layer is None else args.layer
    if not 0 <= layer < seen.choice.shape[1]:
        raise ValueError(f"--layer is {layer}, but the model has layers 0 to {seen.choice.shape[1] - 1}")
    args.output.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {"rows": len(rows), "gate reads": "S W" if seen.mapped is not None else "E"}
    for what, labels in (("language", languages), ("task", tasks)):
        names, share = shares(seen.choice, labels)
        figures.plot_shares(names, share, what, args.output / f"gate_by_{what}.png")
        numbers[what] = dict(zip(names, share.tolist(), strict=True))
    draw_plane(seen, languages, layer, args.output / f"activations_layer{layer}.png")
    return numbers


def draw_plane(seen: GateChoices, languages: list[str], layer: int, path: Path) -> None:
    """Two principal components of S, S W and E at one layer, by language."""
    kinds = {"S (target)": seen.source, "S W": seen.mapped, "E (English)": seen.english}
    kinds = {name: values[:, layer] for name, values in kinds.items() if values is not None}
    points, explained = principal_components(list(kinds.values()))
    figures.plot_plane(dict(zip(kinds, points, strict=True)), languages, explained, layer, path)


if __name__ == "__main__":
    cli.run(main)
