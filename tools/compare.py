"""Compare evaluations: scores of several runs by language, differences from the first, and their significance.

    python tools/compare.py outputs/8b-sft/evaluation outputs/8b/evaluation --names SFT CC-Tuning --output_dir compared
    python tools/compare.py plain/XNLI.json transform/XNLI.json

Each argument is a json file of tools/evaluate.py or a folder of them; the first is the baseline. Tasks that two or more
of them hold are compared, each on the rows that all its runs answered. Under --output_dir: compare.md, compare.csv,
compare.png.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.eval.comparison import compare_runs, format_markdown, plot_comparisons, read_runs, write_csv


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="json files or folders; the first is the baseline")
    parser.add_argument("--names", nargs="+", help="a label for each (default: file or folder, and mode)")
    parser.add_argument("--metric", help="which score (default: each task's headline)")
    parser.add_argument("--output_dir", type=Path, help="folder for the table (md, csv) and the figure")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the runs, compare, and write table, csv and figure."""
    args = parse(argv)
    if args.names and len(args.names) != len(args.runs):
        raise ValueError(f"--names has {len(args.names)} labels for {len(args.runs)} runs")
    runs = [run for place, path in enumerate(args.runs) for run in read_runs(path, args.names and args.names[place])]
    by_task: dict[str, list] = {}
    for run in runs:
        by_task.setdefault(run.task, []).append(run)
    comparisons = [compare_runs(of_task, args.metric, args.seed) for of_task in by_task.values() if len(of_task) > 1]
    if not comparisons:
        raise ValueError(f"no task is in two of the runs: {', '.join(by_task)}")
    text = "\n\n".join(format_markdown(comparison) for comparison in comparisons)
    print(text)
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "compare.md").write_text(text + "\n", encoding="utf-8")
        write_csv(comparisons, args.output_dir / "compare.csv")
        plot_comparisons(comparisons, args.output_dir / "compare.png")


if __name__ == "__main__":
    cli.run(main)
