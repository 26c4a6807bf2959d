"""cc_ds/train.py with one thing going wrong on one rank: torchrun ... tests/dist/faulty.py FAULT@STEP:RANK --config ...

kill      SIGKILL in the middle of the step
kill_save SIGKILL while the rank writes its part of the checkpoint at this step
hang      the rank sleeps in the middle of the step
term_eval SIGTERM to the rank in the first batch of the evaluation after the step
nan       the step's loss is NaN on the rank
nan_on    from this step on
none      nothing

When it strikes, it touches the file that FAULT_STAMP names.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cc_ds import CCModelForCausalLM, cli
from cc_ds.dist import writer
from cc_ds.dist.group import group_left_after
from cc_ds.feed import StepFeed
from cc_ds.train import main
from cc_ds.trainer import Trainer


def stamp() -> None:
    """Now it happened."""
    Path(os.environ["FAULT_STAMP"]).touch()


def inject(fault: str, step: int, rank: int) -> None:
    """Wrap the one place where the fault shows."""
    if int(os.environ["RANK"]) != rank:
        return
    now = {"step": 0}
    train_step, next_of_feed = Trainer.train_step, StepFeed.__next__
    save, eval_batches = writer.CheckpointWriter.save, Trainer._eval_batches

    def watched_train_step(self):
        now["step"] = self.step + 1
        train_step(self)

    def watched_next(self):
        if now["step"] == step and fault in ("kill", "hang"):
            stamp()
        if now["step"] == step and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if now["step"] == step and fault == "hang":
            time.sleep(600)
        return next_of_feed(self)

    def watched_save(self, state_dict, path):
        if now["step"] == step and fault == "kill_save":
            Path(path).write_bytes(b"half a file")
            stamp()
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, state_dict, path)

    def watched_eval_batches(self):
        for number, batch in enumerate(eval_batches(self)):
            if number == 0 and now["step"] == step and fault == "term_eval":
                stamp()
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    Trainer._eval_batches = watched_eval_batches
    Trainer.train_step, StepFeed.__next__, writer.CheckpointWriter.save = watched_train_step, watched_next, watched_save
    if fault in ("nan", "nan_on"):
        forward = CCModelForCausalLM.forward

        def forward_with_nan(self, *arguments, **options):
            output = forward(self, *arguments, **options)
            hit = now["step"] == step or (fault == "nan_on" and now["step"] > step)
            if hit and output.loss is not None:
                output.loss = output.loss * math.nan
            return output

        CCModelForCausalLM.forward = forward_with_nan


if __name__ == "__main__":
    name, _, where = sys.argv[1].partition("@")
    if name != "none":
        inject(name, *map(int, where.split(":")))
    with group_left_after():
        cli.run(lambda: main(sys.argv[2:]))
