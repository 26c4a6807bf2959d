"""Who is in charge of output_dir, and what a script reads there."""

from __future__ import annotations

import json

import pytest

from cc_ds.dist.group import Group
from cc_ds.run_state import RunState, StaleRunError

ALONE = Group.alone()


def read(run: RunState) -> dict:
    return json.loads((run.output_dir / "run_state.json").read_text())


def test_each_start_is_a_generation(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    first, second = RunState(tmp_path, ALONE), RunState(tmp_path, ALONE)
    assert (first.generation, second.generation) == (1, 2)
    second.check()
    with pytest.raises(StaleRunError, match=r'"attempt": "12.0"'):
        first.check()


def test_states(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with RunState(tmp_path, ALONE) as run:
        assert read(run)["state"] == "running" and read(run)["attempt"] == "12.3"
        size = (tmp_path / "run_state.json").stat().st_size
        run.step = 8
        run.write("finished")
    assert read(run) | {"message": ""} == {
        "state": "finished", "attempt": "12.3", "generation": 1, "step": 8, "message": "",
    }  # fmt: skip
    assert (tmp_path / "run_state.json").stat().st_size == size  # a full disk must not hide how a run ended


@pytest.mark.parametrize(
    ("raised", "state"),
    [(ValueError("bad row"), "error"), (RuntimeError("peer gone"), "running"), (StaleRunError("x"), "running")],
)
def test_a_mistake_is_recorded_and_a_crash_is_not(tmp_path, raised, state):
    with pytest.raises(type(raised)), RunState(tmp_path, ALONE) as run:
        raise raised
    assert read(run)["state"] == state
    assert (read(run)["message"] == "bad row") == (state == "error")
