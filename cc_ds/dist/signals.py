"""What someone outside asks of a running job, agreed on by all ranks between steps and between an evaluation's batches.

    SIGUSR1               save a checkpoint and end: the job is about to be preempted or to reach its time limit
    SIGTERM               save a checkpoint and end: the job is being cancelled, or a node is cleaned up
    output_dir/save_now   save a checkpoint and go on (touch the file; it is removed when seen)
    output_dir/stop_now   save a checkpoint and end

One rank's word is enough. Its flag is reduced over the ranks through a group of its own on the CPU, started at one
boundary and read at the next, so that neither host nor device waits for it: a request takes effect one boundary later.
"""

from __future__ import annotations

import enum
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cc_ds.dist.group import Group

# Seconds between looks at output_dir, which may lie on a busy network file system.
_LOOK_EVERY = 2.0


class Request(enum.IntEnum):
    """What is asked; of two at once the higher counts."""

    NONE = 0
    SAVE = 1
    PREEMPT = 2
    TERMINATE = 3
    STOP = 4


class Requests:
    """Listens from the moment it is made; `join` lets it agree with the other ranks."""

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self._signalled = Request.NONE
        self._former = {}
        for number in (signal.SIGUSR1, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._on_signal)

    def join(self, group: Group) -> None:
        """Every rank must call it, once."""
        self._group = group
        self._channel = dist.new_group(backend="gloo") if group.world_size > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._reduction = None
        self._looked = 0.0

    def poll(self) -> Request:
        """What to do now, the same on every rank; every rank must call it equally often."""
        asked = max(self._signalled, self._look_at_files())
        if self._channel is None:
            return asked
        agreed = Request.NONE
        if self._reduction is not None:
            self._reduction.wait()
            agreed = Request(int(self._flag))
        self._flag = torch.tensor([int(asked)])
        self._reduction = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._channel, async_op=True)
        return agreed

    def close(self) -> None:
        """Stop listening; signals do again what they did before."""
        if getattr(self, "_reduction", None) is not None:
            self._reduction.wait()
            self._reduction = None
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _on_signal(self, number: int, frame) -> None:
        request = Request.PREEMPT if number == signal.SIGUSR1 else Request.TERMINATE
        self._signalled = max(self._signalled, request)

    def _look_at_files(self) -> Request:
        if not self._group.is_main or time.monotonic() - self._looked < _LOOK_EVERY:
            return Request.NONE
        self._looked = time.monotonic()
        found = Request.NONE
        for name, request in (("save_now", Request.SAVE), ("stop_now", Request.STOP)):
            try:
                os.unlink(self.output_dir / name)
            except FileNotFoundError:
                continue
            found = request
        return found
