"""Runs training commands in the processes that a launcher started, and writes the bytes that DeepSpeed's comms logger
saw in each one's last step.

torchrun --nproc_per_node 2 tests/dist/logged_worker.py commands.json bytes.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cc_ds.dist.group import stop_group
from cc_ds.train import main
from cc_ds.trainer import Trainer

moved: list[dict[str, int]] = []
train_step = Trainer.train_step


def logged_step(self) -> None:
    """A step with the log emptied before it."""
    from deepspeed.comm import comms_logger

    comms_logger.comms_dict.clear()
    train_step(self)
    moved[-1] = {
        operation: sum(size * entry[0] for size, entry in sizes.items())
        for operation, sizes in comms_logger.comms_dict.items()
    }
    moved[-1]["rank"] = self.group.rank


if __name__ == "__main__":
    Trainer.train_step = logged_step
    for command in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        moved.append({})
        main(command)
    if moved[-1]["rank"] == 0:
        Path(sys.argv[2]).write_text(json.dumps(moved), encoding="utf-8")
    stop_group()
