"""Waiting for the main rank while it works for longer than a collective may take.

A rank that waits in a barrier for the process group's limit (DeepSpeed's is 10 minutes, DEEPSPEED_TIMEOUT) ends the
job. Tokenising a large data set, converting a checkpoint or saving a large model takes longer. So the ranks look
instead, once in a while, into the store through which they met, where the main rank leaves a word when it has done, or
has failed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.distributed_c10d import Store, _get_default_store

from cc_ds.dist.group import Group
from cc_ds.telemetry import log

_LOOK_EVERY = 0.5  # seconds
_SAY_EVERY = 60.0  # seconds
# Every rank counts its calls, so that each call has a key of its own, the same on every rank.
_calls = itertools.count()


@contextmanager
def main_first(group: Group, what: str) -> Iterator[None]:
    """The main rank runs the block before the others, which then find its work on disk; however long it takes.

    Args:
        what: the work, for the log of those who wait ("tokenising").

    Raises:
        ValueError: on every rank, what the main rank's block raised.
        RuntimeError: on the others, when the main rank's block failed in another way.
    """
    if group.world_size == 1:
        yield
        return
    store, key = _get_default_store(), f"cc_ds/main_first/{next(_calls)}"
    if not group.is_main:
        _wait(store, key, what)
        yield
        return
    try:
        yield
    except BaseException as error:
        store.set(key, f"{'mistake' if isinstance(error, ValueError) else 'failure'}:{error}")
        raise
    store.set(key, "done:")


def _wait(store: Store, key: str, what: str) -> None:
    begin = said = time.monotonic()
    while not store.check([key]):
        time.sleep(_LOOK_EVERY)
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            log.info("waiting for rank 0, which is %s: %.0f minutes so far", what, (said - begin) / 60)
    how, _, message = store.get(key).decode().partition(":")
    if how == "mistake":
        raise ValueError(message)
    if how == "failure":
        raise RuntimeError(f"rank 0 failed while {what}: {message}")
