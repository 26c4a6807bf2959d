"""The loop around the steps: what is saved and evaluated when, what ends it, and whose time counts."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import Column, Dataset
from tiny_models import cc_model, tokenised_rows

from cc_ds import telemetry, trainer
from cc_ds.config import load_config
from cc_ds.dist import signals
from cc_ds.dist.group import Group
from cc_ds.dist.signals import Request, Requests
from cc_ds.models.attention import PACKED
from cc_ds.run_state import RunState
from cc_ds.trainer import Trainer


class Engine:
    """As much of an engine as the loop needs."""

    optimizer = None

    def __init__(self) -> None:
        self.module = cc_model()
        self.module.set_attn_implementation(PACKED)

    def __call__(self, **batch):
        return self.module(**batch)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def get_lr(self) -> list[float]:
        return [0.0]

    def get_global_grad_norm(self) -> float:
        return 0.0


class Clock:
    """Seconds, as they are spent."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


@pytest.fixture
def run(tmp_path, monkeypatch, clock):
    """A function from options to a trainer, and to what it will have done: steps take 1 second, checkpoints 10."""
    monkeypatch.setattr(signals, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(trainer, "layout_state", lambda *_: {})
    monkeypatch.setattr(trainer, "peak_flops", lambda _: 1.0)
    done, listening = [], []

    def save_checkpoint(engine, group, run, state, **_):
        clock.now += 10
        done.append(f"save {state['step']}")

    class Watched(Trainer):
        during = None
        """What happens in the first batch of an evaluation."""

        def train_step(self) -> None:
            clock.now += 1
            self.window.sums[1] += 60
            self.step += 1
            self.window.add_step(0, applied=True)

        def evaluate(self) -> float | None:
            loss = super().evaluate()
            done.append(f"{'evaluate' if loss else 'leave out'} {self.step}")
            return loss

        def _eval_batches(self):
            for number, batch in enumerate(super()._eval_batches()):
                clock.now += 100
                if self.during and number == 1:
                    self.during()
                yield batch

    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)

    def make(*options: str) -> tuple[Trainer, list[str]]:
        words = ["--model_name_or_path", "m", "--train_file", "f", "--validation_file", "f", "--output_dir",
                 str(tmp_path), "--disable_tqdm", "--max_steps", "6", "--per_device_train_batch_size", "1",
                 "--per_device_eval_batch_size", "1", *options]  # fmt: skip
        group, rows = Group.alone(), Dataset.from_list(tokenised_rows())
        requests = Requests(tmp_path)
        listening.append(requests)
        requests.join(group)
        made = Watched(Engine(), group, load_config(words), rows, rows, 0, RunState(tmp_path, group), requests)
        made.grad_norm = torch.zeros(())
        return made, done

    (tmp_path / "logs").mkdir()
    yield make
    for requests in listening:
        requests.close()


def test_a_checkpoint_comes_before_an_evaluation(run):
    made, done = run("--save_steps", "2", "--eval_steps", "2")
    assert made.train() is Request.NONE
    assert done == ["save 2", "evaluate 2", "save 4", "evaluate 4", "save 6", "evaluate 6"]
    assert made.engine.module.training


@pytest.mark.parametrize("save_steps", ["0", "2"])
def test_a_signal_during_an_evaluation_ends_it(save_steps, run):
    made, done = run("--save_steps", save_steps, "--eval_steps", "2")
    made.during = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert made.train() is Request.TERMINATE
    assert sorted(done) == ["leave out 2", "save 2"], "a checkpoint, and one alone"


def test_who_is_asked_to_end_evaluates_no_more(run, tmp_path):
    made, done = run("--eval_steps", "1")
    (tmp_path / "stop_now").touch()
    assert made.train() is Request.STOP
    assert done == ["save 1", "leave out 1"]


def test_asked_to_end_during_the_last_evaluation(run):
    made, done = run()
    made.during = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    assert made.train() is Request.NONE, "what is left is to write the model"
    assert done == ["leave out 6", "save 6"]


def test_a_checkpoint_asked_for_during_an_evaluation_is_made(run, tmp_path):
    made, done = run("--eval_steps", "4")
    made.during = lambda: made.step == 4 and (tmp_path / "save_now").touch()
    assert made.train() is Request.NONE
    assert done == ["evaluate 4", "save 5", "evaluate 6"]


def test_stop_after_steps(run):
    made, done = run("--eval_steps", "2", "--stop_after_steps", "2")
    assert made.train() is Request.NONE
    assert done == ["save 2", "evaluate 2"]


def test_speed_is_that_of_the_steps_alone(run, clock, monkeypatch):
    made, _ = run("--logging_steps", "3", "--save_steps", "2", "--eval_steps", "2")
    written = []
    monkeypatch.setattr(
        trainer, "Telemetry", lambda *_: SimpleNamespace(write=lambda _, values: written.append(values), close=int)
    )
    clock.now += 1000  # a checkpoint is loaded
    made.train()
    assert [values["tokens_per_second"] for values in written if "loss" in values] == [60, 60]


def test_languages_are_found_without_a_walk_over_the_rows(run, monkeypatch):
    monkeypatch.setattr(Column, "__iter__", None)
    assert run()[0].window.languages == ["sw"]
