"""Waiting for the main rank while it works for longer than a collective may take.

A rank that waits in a barrier for longer than the process group's limit (`collective_limit` in group.py; half an hour
or so) ends the job. Tokenising a large data set, converting a checkpoint or saving a large model can take longer. So
the ranks look instead, once in a while, into the store through which they met, where those who work first leave a word
when they have done, or have failed.

    main rank  ->  the first rank of every other node  ->  all others          each waits for those before it
    and nobody goes on before all are through

The first of a node does the work again where its node has a disk of its own, and finds it done where nodes share one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
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
    """The main rank runs the block first, then one rank of each node, then the others; however long it takes.

    The others find the work on disk. No rank leaves before all have been through.

    Args:
        what: the work, for the log of those who wait ("tokenising").

    Raises:
        ValueError: on every rank, what the block of one raised.
        RuntimeError: on the others, when the block of one failed in another way.
    """
    if group.world_size == 1:
        yield
        return
    store, key = _get_default_store(), f"cc_ds/main_first/{next(_calls)}"
    through = f"{key}/through"
    first_of_node = group.rank - group.local_rank
    if not group.is_main:
        _wait(store, key, lambda: store.check([f"{key}/0"]), "rank 0", what)
        if group.rank != first_of_node:
            _wait(store, key, lambda: store.check([f"{key}/{first_of_node}"]), f"rank {first_of_node}", what)
    try:
        yield
    except BaseException as error:
        how = "mistake" if isinstance(error, ValueError) else "failure"
        store.set(f"{key}/failed", f"{how}:{group.rank}:{error}")
        raise
    store.set(f"{key}/{group.rank}", "done")
    store.add(through, 1)
    _wait(store, key, lambda: store.add(through, 0) == group.world_size, "the other ranks", what)


def _wait(store: Store, key: str, ready: Callable[[], bool], whom: str, what: str) -> None:
    """Until `ready`; raises what another rank failed with."""
    begin = said = time.monotonic()
    while not ready():
        if store.check([f"{key}/failed"]):
            how, rank, message = store.get(f"{key}/failed").decode().split(":", 2)
            raise (
                ValueError(message) if how == "mistake" else RuntimeError(f"rank {rank} failed while {what}: {message}")
            )
        time.sleep(_LOOK_EVERY)
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            log.info("waiting for %s, %s: %.0f minutes so far", whom, what, (said - begin) / 60)
