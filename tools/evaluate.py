"""Ask a model the questions of one or more tasks and print its scores by language.

    python tools/evaluate.py --model runs/demo/model_with_transform --task atlas
    torchrun --nproc_per_node 8 tools/evaluate.py --model outputs/8b --task XNLI MKQA --output_dir outputs/8b/evaluation

Tasks: atlas (the demo's test split), XNLI, XStoryCloze, MMMLU, XQuAD, MKQA, XLSum (from their Hugging Face data sets,
or from copies in --hub_dir), or rows of your own, which --data names: a file, or a folder with one L.jsonl per language
(columns: see cc_ds/eval/tasks.py). With several tasks --data is a folder that holds one folder per task.

Modes: plain (no connection), transform (as deployed: rows in English are read without the connection), english
(connected to the real English prompt: the upper bound). The default is transform where the model has one, else plain.

Under --output_dir, TASK.json holds scores and every answer, TASK.txt the table, TASK.png the figure, and TASK.answers
what was answered so far: a run that was killed goes on there. Another mode or model needs a folder of its own. Ranks of
torchrun or srun share the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli
from cc_ds.dist.group import Group, group_left_after, start_group
from cc_ds.dist.patience import main_first
from cc_ds.eval.journal import Journal, model_fingerprint
from cc_ds.eval.metrics import METRICS
from cc_ds.eval.report import format_table, plot_languages
from cc_ds.eval.run import MODES, EvalResult, evaluate, write_json
from cc_ds.eval.tasks import Task, load_task
from cc_ds.infer.generate import ENGLISH


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = cli.tool_parser(__doc__)
    parser.add_argument("--task", nargs="+", default=["atlas"], help="which tasks (default atlas)")
    parser.add_argument("--data", type=Path, help="file or folder of rows")
    parser.add_argument("--hub_dir", type=Path, help="folder with copies of the benchmarks' data sets (OWNER/NAME)")
    parser.add_argument("--metrics", nargs="+", choices=sorted(METRICS), help="in place of the task's own")
    parser.add_argument("--mode", choices=MODES, help="default: transform where the model has one, else plain")
    parser.add_argument("--langs", nargs="+", help="only these languages")
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=list(ENGLISH),
        help="languages that mode transform reads without the connection (default: English)",
    )
    parser.add_argument("--limit", type=cli.positive, help="at most so many rows of each language, the first ones")
    parser.add_argument("--max_new_tokens", type=cli.positive, help="per answer (default: 40 for benchmarks, else 64)")
    parser.add_argument("--output_dir", type=Path, help="folder for scores, answers, tables and figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Evaluate every task, print, and write what was asked for."""
    args = parse(argv)
    group = start_group() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Group.alone()
    if group.world_size > 1 and args.device is None:
        args.device = str(group.device)
    with main_first(group, "fetching the tasks"):  # what comes from the hub is fetched once
        tasks = [load(name, args) for name in args.task]
    model, tokenizer, template = cli.load_model(args)
    mode = args.mode or ("plain" if model.transform is None else "transform")
    if mode != "plain":
        cli.check_gate(model, args.model)
    fingerprint = None
    if args.output_dir:
        group.main_only(lambda: check_results(tasks, args, mode))
        fingerprint = group.main_only(lambda: model_fingerprint(args.model))
    for task in tasks:
        result = evaluate(
            model,
            tokenizer,
            template,
            task,
            mode=mode,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            group=group,
            exclude=args.exclude,
            journal=Journal(args.output_dir / f"{task.name}.answers", fingerprint) if fingerprint else None,
        )
        if group.is_main:
            report(result, args, group.world_size)


def load(name: str, args: argparse.Namespace) -> Task:
    """The task, at most `--limit` rows of each language."""
    data = args.data / name if args.data and len(args.task) > 1 else args.data
    task = load_task(name, data, seed=args.seed, langs=args.langs, metrics=args.metrics, hub_dir=args.hub_dir)
    taken: Counter[str] = Counter()
    rows = []
    for row in task.rows:
        taken[row.lang] += 1
        if args.limit is None or taken[row.lang] <= args.limit:
            rows.append(row)
    return replace(task, rows=rows)


def check_results(tasks: list[Task], args: argparse.Namespace, mode: str) -> None:
    """ValueError: --output_dir holds a result of one of the tasks in another mode, or of another model."""
    for task in tasks:
        file = args.output_dir / f"{task.name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["mode"] != mode or Path(found["model"]).absolute() != Path(args.model).absolute():
            raise ValueError(
                f"{file} is the result of mode {found['mode']} of {found['model']}, and this run's is of mode {mode} "
                f"of {args.model}: name another --output_dir, or remove the file"
            )


def report(result: EvalResult, args: argparse.Namespace, ranks: int) -> None:
    """Print the table; write it, the json and the figure where a folder is named."""
    table = format_table(result)
    print(f"{result.task}\n{table}\n" if len(args.task) > 1 else table)
    if args.output_dir is None:
        return
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(result, args.output_dir / f"{result.task}.json", model=args.model, ranks=ranks, settings=settings)
    (args.output_dir / f"{result.task}.txt").write_text(table + "\n", encoding="utf-8")
    plot_languages(result, args.output_dir / f"{result.task}.png")


if __name__ == "__main__":
    with group_left_after():
        cli.run(main)
