"""A run that goes on with more or fewer ranks, or another tensor-parallel size, ends as the one that was never stopped,
and deals the same rows.

Dropout is off: it is drawn by rank.
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
# ZeRO stage, layout before, layout after: data-parallel ranks, or data-parallel x tensor-parallel
CASES = [
    pytest.param(3, "2", "1"),
    pytest.param(2, "2", "4", marks=slow),
    pytest.param(3, "4", "2", marks=slow),
    pytest.param(3, "2", "4", marks=slow),
    pytest.param(2, "2", "1", marks=slow),
    pytest.param(2, "4", "2", marks=slow),
    pytest.param(1, "2", "1", marks=slow),
    pytest.param(1, "2", "4", marks=slow),
    pytest.param(1, "4", "2", marks=slow),
    pytest.param(0, "2", "1", marks=slow),
    pytest.param(0, "2", "4", marks=slow),
    *(pytest.param(stage, *layouts, marks=slow) for stage in (1, 2, 3) for layouts in (("1x2", "1"), ("2", "2x2"))),
    pytest.param(3, "2x2", "2", marks=slow),
]


@pytest.fixture(scope="module")
def runs(base_command, request, tmp_path_factory) -> Path:
    """The undisturbed run, and of every case that is asked for the run before and the run after, in one launch."""
    folder = tmp_path_factory.mktemp("elsewhere")
    common = [*base_command, "--per_device_train_batch_size", "1", "--num_train_epochs", "2",
              "--connection_learning_rate", "3e-2"]  # fmt: skip
    whole = folder / "whole"
    cases = [{"ranks": 1, "command": [*common, *micro_batches(1), "--output_dir", str(whole)], "rows": f"{whole}-rows"}]
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    for case in [item.callspec.params for item in items]:
        stage, before, after = case["stage"], case["before"], case["after"]
        run = folder / f"{stage}-{before}-{after}"
        command = [*common, "--output_dir", str(run), "--deepspeed", zero(folder, stage)]
        former, ours = sizes(before)[0], sizes(after)[0]
        stopped = [*micro_batches(former), "--stop_after_steps", str(STOP)]
        # where the ranks changed, the run itself changes the accumulation, whatever is given
        resumed = [*micro_batches(ours if ours == former else 1), "--resume_from_checkpoint", "latest"]
        for name, layout, more in (("before", before, stopped), ("after", after, resumed)):
            data_size, tensor_size = sizes(layout)
            split = ["--tensor_parallel_size", str(tensor_size)]
            cases.append({"ranks": data_size * tensor_size, "command": [*command, *more, *split],
                          "rows": f"{run}-{name}"})  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    launch([sys.executable, "tests/dist/forked.py", str(folder / "cases.json")], timeout=60 + 20 * len(cases))
    return folder


def micro_batches(ranks: int) -> list[str]:
    """As many as so many ranks need for the rows of a step."""
    return ["--gradient_accumulation_steps", str(ROWS // ranks)]


def sizes(layout: str) -> tuple[int, int]:
    """Data-parallel and tensor-parallel."""
    data_size, _, tensor_size = layout.partition("x")
    return int(data_size), int(tensor_size or 1)


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
    """The rows of each step, over all ranks, by the number of rows dealt after it."""
    steps: dict[int, list[str]] = {}
    for file in folder.glob("*.jsonl"):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            steps.setdefault(line["position"], []).extend(line["rows"])
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


@pytest.mark.parametrize(("stage", "before", "after"), CASES)
def test_as_if_nothing_had_changed(stage, before, after, runs):
    run, whole = runs / f"{stage}-{before}-{after}", runs / "whole"
    first, second = dealt(Path(f"{run}-before")), dealt(Path(f"{run}-after"))
    assert list(first) == [8, 16] and list(second) == [24, 32, 40, 48]
    assert first | second == dealt(Path(f"{whole}-rows"))
    torch.testing.assert_close(losses(run), losses(whole), atol=1e-5, rtol=0)
    found, expected = weights(run), weights(whole)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert (run / f"checkpoint-{STOP:06d}.universal/complete.json").exists() == (stage > 0)


def test_every_row_once_an_epoch(runs):
    """What the comparison above rests on."""
    steps = list(dealt(runs / "whole-rows").values())
    for epoch in (steps[:3], steps[3:]):
        assert len({row for rows in epoch for row in rows}) == sum(map(len, epoch)) == 24
