"""Signals and files become requests."""

from __future__ import annotations

import os
import signal

import pytest

from cc_ds.dist import signals
from cc_ds.dist.group import Group
from cc_ds.dist.signals import Request, Requests


@pytest.fixture
def requests(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_LOOK_EVERY", 0.0)
    made = Requests(tmp_path)
    made.join(Group.alone())
    yield made
    made.close()


@pytest.mark.parametrize(
    ("number", "request_"), [(signal.SIGUSR1, Request.PREEMPT), (signal.SIGTERM, Request.TERMINATE)]
)
def test_a_signal_stays(requests, number, request_):
    assert requests.poll() is Request.NONE
    os.kill(os.getpid(), number)
    assert requests.poll() is request_ and requests.poll() is request_


def test_cancelling_counts_more_than_preemption(requests):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.poll() is Request.TERMINATE


@pytest.mark.parametrize(("name", "request_"), [("save_now", Request.SAVE), ("stop_now", Request.STOP)])
def test_a_file_asks_once(requests, tmp_path, name, request_):
    (tmp_path / name).touch()
    assert requests.poll() is request_
    assert requests.poll() is Request.NONE and not (tmp_path / name).exists()


def test_former_handlers_return(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    Requests(tmp_path).close()
    assert signal.getsignal(signal.SIGUSR1) is before
