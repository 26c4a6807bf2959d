"""Ask a model the questions of a task and print its scores by language.

    python tools/evaluate.py --model runs/demo/model_with_transform --task atlas

Without --data the task is the Atlas demo's test split; --data names a file, or a folder with one L.jsonl per language
(columns: see cc_ds/eval/tasks.py). Modes: plain (no connection), transform (as deployed), english (connected to the
real English prompt: the upper bound). The default is transform where the model has one, else plain.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.eval.run import MODES, evaluate, format_table, write_json
from cc_ds.eval.tasks import EvalRow, load_task


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.tool_parser(__doc__)
    parser.add_argument("--task", default="atlas", help="atlas, or a name for what --data holds (default atlas)")
    parser.add_argument("--data", help="file or folder of rows")
    parser.add_argument("--mode", choices=MODES, help="default: transform where the model has one, else plain")
    parser.add_argument("--langs", nargs="+", help="only these languages")
    parser.add_argument("--limit", type=cli.positive, help="at most so many rows of each language, the first ones")
    parser.add_argument("--max_new_tokens", type=cli.positive, default=64, help="per answer (default 64)")
    parser.add_argument("--output", type=Path, help="json file for scores and answers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = choose(load_task(args.task, args.data, seed=args.seed).rows, args.langs, args.limit)
    model, tokenizer, template = cli.load_model(args)
    mode = args.mode or ("plain" if model.transform is None else "transform")
    result = evaluate(
        model,
        tokenizer,
        template,
        rows,
        mode=mode,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    print(format_table(result))
    if args.output:
        write_json(result, args.output, model=args.model, task=args.task, data=args.data, seed=args.seed)


def choose(rows: list[EvalRow], langs: list[str] | None, limit: int | None) -> list[EvalRow]:
    """Rows of these languages, at most `limit` of each."""
    if unknown := set(langs or ()) - {row.lang for row in rows}:
        raise ValueError(
            f"no rows in {', '.join(sorted(unknown))}; there are {', '.join(sorted({r.lang for r in rows}))}"
        )
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        if (langs is None or row.lang in langs) and (limit is None or taken[row.lang] < limit):
            taken[row.lang] += 1
            chosen.append(row)
    return chosen


if __name__ == "__main__":
    cli.run(main)
