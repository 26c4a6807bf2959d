"""Runs training commands one after another, each on as many ranks as it asks for, forked from one process that has
imported everything: a case costs seconds, not the imports.

python tests/dist/forked.py cases.json      # [{"ranks": 2, "command": ["--output_dir", ...], "rows": FOLDER}, ...]

With "rows", rank N of the case appends its rows of each step to FOLDER/N.jsonl: {"position": rows dealt to all ranks so
far, "rows": [...]}; of the ranks of a tensor group, which read the same, the first alone.
A case that fails ends the whole.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cc_ds import cli
from cc_ds.dist.group import group_left_after
from cc_ds.feed import StepFeed
from cc_ds.train import main


def record_rows(file: Path) -> None:
    """Keep what a rank is dealt."""
    next_step = StepFeed.__next__

    def recorded(self):
        step = next_step(self)
        if self.group.tensor_rank:
            return step
        line = {"position": self.stream.position, "rows": step.sources}
        with open(file, "a", encoding="utf-8") as sink:
            sink.write(json.dumps(line) + "\n")
        return step

    StepFeed.__next__ = recorded


def as_rank(case: dict, rank: int, port: int) -> None:
    """One rank of a case; ends the process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case["ranks"]), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    if "rows" in case:
        Path(case["rows"]).mkdir(exist_ok=True)
        record_rows(Path(case["rows"], f"{rank}.jsonl"))
    with group_left_after():
        cli.run(lambda: main(case["command"]))


def run(case: dict) -> None:
    """All ranks of a case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(case["ranks"]):
        child = os.fork()
        if child == 0:
            as_rank(case, rank, port)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        sys.exit(f"{case}: codes {codes}")


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(each)
