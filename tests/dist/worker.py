"""Runs training commands one after another in the processes that a launcher started: imports are paid once.

torchrun --nproc_per_node 2 tests/dist/worker.py commands.json      # [["--output_dir", ...], ...]

A command may end with --logits_chunk N: the loss then takes chunks of so many values.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cc_ds.connection import loss
from cc_ds.dist.group import stop_group
from cc_ds.train import main

if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        whole = loss.LOGITS_CHUNK
        if "--logits_chunk" in command:
            loss.LOGITS_CHUNK = int(command.pop())
            command.pop()
        main(command)
        loss.LOGITS_CHUNK = whole
    stop_group()
