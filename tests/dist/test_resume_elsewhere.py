"""A run that goes on with more or fewer ranks ends as the one that kept them, and deals the same rows.

Adam's second moment is small after few steps, so that a rounding difference of a gradient near zero shows in a weight:
weights agree to 1e-4 of a learning rate of 1e-2, losses to 1e-5.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import launch, read_metrics

# 24 rows, 8 a step: 3 steps an epoch, 6 in all; step 2 is the middle of epoch 1
STOP, STEPS, ROWS = 2, 6, 8
slow = pytest.mark.slow
CASES = [
    pytest.param(3, 2, 1),
    pytest.param(2, 2, 4),
    pytest.param(3, 4, 2, marks=slow),
    pytest.param(3, 2, 4, marks=slow),
    pytest.param(2, 2, 1, marks=slow),
    pytest.param(2, 4, 2, marks=slow),
    pytest.param(1, 2, 1, marks=slow),
    pytest.param(1, 2, 4, marks=slow),
    pytest.param(1, 4, 2, marks=slow),
    pytest.param(0, 2, 1, marks=slow),
    pytest.param(0, 2, 4, marks=slow),
]


@pytest.fixture(scope="module")
def command(base_command):
    # as many micro-batches as two ranks need for 8 rows; other numbers of ranks change that by themselves
    return [*base_command, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", "--save_steps",
            "0", "--num_train_epochs", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    forked(folder, {"ranks": 2, "command": [*command, "--output_dir", f"{folder}/run"], "rows": f"{folder}/rows"})
    assert len(losses(folder / "run")) == STEPS
    return folder


def forked(folder: Path, *cases: dict):
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    return launch([sys.executable, "tests/dist/forked.py", str(folder / "cases.json")])


def zero(folder: Path, stage: int) -> str:
    path = folder / f"zero{stage}.json"
    # No parameter is small enough to stay whole: everything is partitioned.
    settings = {"stage": stage, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": settings}), encoding="utf-8")
    return str(path)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "cc_connection.safetensors")


def dealt(folder: Path) -> dict[int, list[str]]:
    """The rows of each step, over all ranks."""
    steps: dict[int, list[str]] = {}
    for file in folder.glob("*.jsonl"):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            steps.setdefault(line["step"], []).extend(line["rows"])
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


@pytest.mark.parametrize(("stage", "before", "after"), CASES)
def test_as_if_nothing_had_changed(stage, before, after, command, undisturbed, tmp_path):
    run = tmp_path / "run"
    common = [*command, "--output_dir", str(run), "--deepspeed", zero(tmp_path, stage)]
    first = {"ranks": before, "command": [*common, "--stop_after_steps", str(STOP)], "rows": f"{tmp_path}/before"}
    first["command"] += ["--gradient_accumulation_steps", str(ROWS // before)]
    second = {"ranks": after, "command": [*common, "--resume_from_checkpoint", "latest"], "rows": f"{tmp_path}/after"}
    forked(tmp_path, first, second)

    assert dealt(tmp_path / "before") | dealt(tmp_path / "after") == dealt(undisturbed / "rows")
    assert list(dealt(tmp_path / "after")) == list(range(STOP + 1, STEPS + 1))
    torch.testing.assert_close(losses(run), losses(undisturbed / "run"), atol=1e-5, rtol=0)
    found, expected = weights(run), weights(undisturbed / "run")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert (run / f"checkpoint-{STOP:06d}.universal/complete.json").exists() == (stage > 0)


def test_every_row_once_an_epoch(undisturbed):
    """What the comparison above rests on."""
    steps = list(dealt(undisturbed / "rows").values())
    for epoch in (steps[:3], steps[3:]):
        assert len({row for rows in epoch for row in rows}) == sum(map(len, epoch)) == 24
