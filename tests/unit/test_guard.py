"""Losses that are not finite poison their gradient; steps in a row, and spikes, are judged."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from cc_ds.config import load_config
from cc_ds.dist.engine import SkippingAdamW
from cc_ds.dist.group import Group
from cc_ds.guard import Guard, poison_if_not_finite


def guard(tmp_path, *options: str) -> Guard:
    arguments = ["--model_name_or_path", "m", "--train_file", "a", "--output_dir", str(tmp_path), *options]
    return Guard(Group.alone(), load_config(arguments).train)


@pytest.fixture(autouse=True)
def our_log(monkeypatch):
    monkeypatch.setattr(logging.getLogger("cc_ds"), "propagate", True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_poisons_its_gradient(value):
    weight = torch.ones(3, requires_grad=True)
    poison_if_not_finite(weight.sum() + value).backward()
    assert weight.grad.isnan().all()


def test_a_finite_loss_is_untouched():
    loss = torch.tensor(1.2345678, requires_grad=True)
    result = poison_if_not_finite(loss)
    result.backward()
    assert torch.equal(result, loss) and loss.grad == 1


def test_adamw_skips_at_stage_0():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SkippingAdamW([weight], lr=0.1, ranks=Group.alone())
    weight.grad = torch.tensor([1.0, math.inf, 1.0])
    optimizer.step()
    assert optimizer.overflow and torch.equal(weight.data, torch.ones(3)) and not optimizer.state[weight]
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.overflow and (weight.data < 1).all()


def test_steps_in_a_row_end_the_run_and_their_rows_are_named(tmp_path):
    watch = guard(tmp_path, "--max_skipped_steps", "2")
    nan = [torch.tensor(math.nan)]
    watch.after_step(1, False, nan, ["a.jsonl:1"])
    watch.after_step(2, True, [torch.tensor(1.0)], ["a.jsonl:2"])  # a good one in between starts the count anew
    watch.after_step(3, False, nan, ["a.jsonl:3"])
    with pytest.raises(ValueError, match=r"2 steps in a row were skipped, up to step 4, as the loss of rank 0 was NaN"):
        watch.after_step(4, False, nan, ["a.jsonl:4", "a.jsonl:5"])
    assert watch.skipped == 3
    assert json.loads((tmp_path / "skipped_steps.json").read_text()) == [
        {"step": 3, "ranks": [{"rank": 0, "loss": "nan", "rows": ["a.jsonl:3"]}]},
        {"step": 4, "ranks": [{"rank": 0, "loss": "nan", "rows": ["a.jsonl:4", "a.jsonl:5"]}]},
    ]


def test_no_limit(tmp_path):
    watch = guard(tmp_path, "--max_skipped_steps", "0")
    for step in range(9):
        watch.after_step(step, False, [torch.tensor(math.inf)], ["a:1"])
    assert watch.skipped == 9


def feed(watch: Guard, losses: list[float]) -> None:
    for step, loss in enumerate(losses, 1):
        watch.after_step(step, True, [torch.tensor(loss / 2)] * 2, [])


def test_a_spike_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        feed(guard(tmp_path), [1.0] * 30 + [2.9, 3.1, 1.0, 1.0])
    assert [record.getMessage() for record in caplog.records] == [
        "step 32: loss 3.100, 2.100 above the median of the last 50 steps"
    ]


def test_a_spike_stops(tmp_path):
    with pytest.raises(ValueError, match=r"step 25: loss 9.000"):
        feed(guard(tmp_path, "--on_loss_spike", "stop"), [1.0] * 24 + [9.0, 1.0])


def test_falling_and_early_losses_are_no_spikes(tmp_path):
    feed(guard(tmp_path, "--on_loss_spike", "stop"), [9.0, 1.0, 8.0] + [8.0 - 0.2 * step for step in range(40)])
