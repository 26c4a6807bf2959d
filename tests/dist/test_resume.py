"""A run that stops in the middle of epoch 2 and resumes equals the run that did not stop, bit for bit."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from .conftest import launch, read_metrics, torchrun


@pytest.fixture(scope="module")
def dropout_model(model_folder, tmp_path_factory):
    """The tiny model with dropout in its attention, so that the generator's state matters."""
    folder = tmp_path_factory.mktemp("dropout") / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"attention_dropout": 0.2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def command(base_command, dropout_model):
    # 24 rows, 4 a step: 6 steps an epoch, 18 in all; step 9 is the middle of epoch 2
    return [*base_command, "--num_train_epochs", "3", "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "2", "--model_name_or_path", str(dropout_model)]  # fmt: skip


def _losses(folder) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def _weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "cc_connection.safetensors")


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_bit_for_bit(zero, command, tmp_path):
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero}}), encoding="utf-8")
    command = [*command, "--deepspeed", str(config)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs = [
        [*command, "--output_dir", str(whole)],
        [*command, "--output_dir", str(stopped), "--stop_after_steps", "9"],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(runs), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(tmp_path / "commands.json"), ranks=1)
    assert not (stopped / "model.safetensors").exists()

    resume = [*command, "--output_dir", str(stopped), "--resume_from_checkpoint", "latest"]
    launch([sys.executable, "cc_ds/train.py", *resume])  # a new process, and no launcher

    assert _losses(stopped) == _losses(whole)
    assert len(_losses(whole)) == 18
    first, second = _weights(whole), _weights(stopped)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_changed_at_a_resume_counts(command, tmp_path):
    """The rates and the decay of the command line, not those that a checkpoint holds; other rows are told."""
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3}}), encoding="utf-8")
    command = [*command, "--deepspeed", str(config), "--output_dir", str(tmp_path / "run")]
    again = [*command, "--resume_from_checkpoint", "latest"]
    slower = ["--learning_rate", "1e-9", "--weight_decay", "0", "--lr_scheduler_type", "constant"]
    runs = [
        [*command, "--stop_after_steps", "2"],
        [*again, *slower, "--max_steps", "3", "--max_english_length", "8"],
        [*command, "--stop_after_steps", "2"],  # anew, beside checkpoints of later steps
    ]
    (tmp_path / "commands.json").write_text(json.dumps(runs), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(tmp_path / "commands.json"), ranks=1)
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "run") if "loss" in line}
    assert rates[3] == 1e-9
    log = (tmp_path / "run/logs/rank0.log").read_text(encoding="utf-8")
    assert log.count("checkpoint-000002, but others: the data, the chat template,") == 1
    present = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert "checkpoint-000002" in present and "checkpoint-000003" not in present, present
