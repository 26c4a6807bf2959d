"""Ranks that wait for the main one outlast the process group's limit, and share its failure."""

from __future__ import annotations

import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import tiny_models
import torch
from torch.distributed import HashStore

from cc_ds.assemble import export_model
from cc_ds.dist import patience
from cc_ds.dist.group import Group
from cc_ds.dist.patience import main_first
from cc_ds.transform import run as fit

REPOSITORY = Path(__file__).resolve().parents[3]

# A collective of these two ranks may take 2 seconds; the main rank works for 4.
RANK = """
import sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from cc_ds.dist.group import Group
from cc_ds.dist.patience import main_first
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timedelta(seconds=2), rank=rank, world_size=2)
dist.barrier()
for seconds in (4, 0):
    with main_first(Group(rank, 2, torch.device("cpu")), "working"):
        if rank == 0:
            time.sleep(seconds)
        began = time.time()
    everyone = [None, None]
    dist.all_gather_object(everyone, began)
    assert everyone[1] >= everyone[0], everyone
"""


def test_longer_than_a_collective_may_take():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), port], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@pytest.fixture
def other(monkeypatch):
    """Rank 1, while this thread is rank 0; called with seconds to wait, it gives what became of rank 1."""
    store = HashStore()
    monkeypatch.setattr(patience, "_get_default_store", lambda: store)
    monkeypatch.setattr(patience, "_calls", itertools.repeat(0))
    monkeypatch.setattr(patience, "_LOOK_EVERY", 0.01)
    fate: list = []

    def run():
        try:
            with main_first(Group(1, 2, torch.device("cpu")), "tokenising"):
                fate.append("went on")
        except Exception as error:
            fate.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def fate_after(seconds: float = 10) -> list:
        thread.join(seconds)
        return fate

    return fate_after


MAIN = Group(0, 2, torch.device("cpu"))


def test_the_others_come_after(other):
    with main_first(MAIN, "tokenising"):
        assert other(0.2) == []
    assert other() == ["went on"]


def test_the_first_of_each_node_works_before_the_rest_and_nobody_leaves_early(monkeypatch):
    store, entered, left = HashStore(), [], []
    monkeypatch.setattr(patience, "_get_default_store", lambda: store)
    monkeypatch.setattr(patience, "_calls", itertools.repeat(0))
    monkeypatch.setattr(patience, "_LOOK_EVERY", 0.01)

    def run(rank: int) -> None:
        with main_first(Group(rank, 4, torch.device("cpu"), local_rank=rank % 2), "tokenising"):
            entered.append(rank)
            time.sleep(0.2 if rank in (0, 2) else 0.1)
            assert not left
        left.append(rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (3, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert entered[0] == 0 and entered.index(3) > entered.index(2) and sorted(entered) == sorted(left) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("rows.jsonl:3: bad"), ValueError, r"^rows.jsonl:3: bad$"),
        (OSError("gone"), RuntimeError, "^rank 0 failed while tokenising: gone$"),
    ],
)
def test_a_failure_is_shared(other, error, kind, text):
    with pytest.raises(type(error)), main_first(MAIN, "tokenising"):
        raise error
    (fate,) = other()
    with pytest.raises(kind, match=text):
        raise fate


def test_who_waits_says_so(other, monkeypatch, caplog):
    monkeypatch.setattr(patience, "_SAY_EVERY", 0.05)
    monkeypatch.setattr(logging.getLogger("cc_ds"), "propagate", True)
    with caplog.at_level(logging.INFO), main_first(MAIN, "tokenising"):
        time.sleep(0.3)
    other()
    assert "waiting for rank 0, tokenising" in caplog.text


@pytest.mark.parametrize("what", ["trained", "fitted"])
def test_no_rank_is_in_a_barrier_while_the_main_one_saves(what, tmp_path, monkeypatch):
    store, in_barrier, meanwhile = HashStore(), [], []
    monkeypatch.setattr(patience, "_get_default_store", lambda: store)
    monkeypatch.setattr(patience, "_calls", itertools.repeat(0))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: in_barrier.append(threading.current_thread().name))
    monkeypatch.setattr(fit, "write_json", MagicMock())
    monkeypatch.setattr(fit, "plot_report", MagicMock())
    model = tiny_models.cc_model()

    def save_slowly(*args, **kwargs):
        time.sleep(1.2)
        meanwhile.extend(in_barrier)

    monkeypatch.setattr(model, "save_pretrained", save_slowly)

    def save(rank: int):
        group = Group(rank, 2, torch.device("cpu"))
        if what == "fitted":
            fit.save_fitted(model, MagicMock(), {}, tmp_path, group)
        else:
            export_model(MagicMock(engine=MagicMock(module=model), group=group), MagicMock(), tmp_path)

    other = threading.Thread(target=save, args=(1,), name="other")
    other.start()
    save(0)
    other.join(10)
    assert meanwhile == [] and len(in_barrier) == 2
