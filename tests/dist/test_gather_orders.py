"""ZeRO-3 knows the order of gathers of every pass of a step: it goes on gathering ahead when passes alternate."""

from __future__ import annotations

import json
import sys

import pytest

from .conftest import launch

# Trains, and says in which state every record of an order is after each step.
_SCRIPT = """
import sys
from cc_ds.train import main
from cc_ds.trainer import Trainer

step = Trainer.train_step

def watched(self):
    step(self)
    offload = self.engine.optimizer.parameter_offload
    known = {"usual": offload.param_coordinator, **self.gather_orders._coordinators}
    print("ORDERS", *sorted(f"{kind}={c.is_complete_trace()}" for kind, c in known.items()))

Trainer.train_step = watched
main(sys.argv[1:])
"""


@pytest.mark.parametrize("english_grad", [True, False])
def test_every_order_is_known_from_the_third_step_on(english_grad, base_command, tmp_path):
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    options = ["--output_dir", str(tmp_path / "run"), "--deepspeed", str(config), "--max_steps", "5",
               "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3",
               "--english_grad", str(english_grad)]  # fmt: skip
    result = launch([sys.executable, "-c", _SCRIPT, *base_command, *options])
    kinds = {"usual", "english forward"} | ({"english backward"} if english_grad else set())
    assert len(_orders(result.stdout)) == 5
    for line in _orders(result.stdout)[2:]:
        assert "=False" not in line and all(f"{kind}=True" in line for kind in kinds), line


def _orders(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ORDERS")]
