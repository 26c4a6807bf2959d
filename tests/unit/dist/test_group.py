"""Where ranks compute, and how long they wait for each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from cc_ds import train
from cc_ds.dist import group
from cc_ds.dist.group import choose_accelerator, collective_limit, start_group

REPOSITORY = Path(__file__).resolve().parents[3]

# The limits of all ranks' group, of ZeRO's clone of it, and of one for requests.
LIMITS = """
import torch, torch.distributed as dist
from cc_ds.dist.group import start_group
start_group(step_timeout=2400.0)
from deepspeed.utils import groups
for group in (dist.group.WORLD, groups._clone_world_group(), dist.new_group(backend="gloo")):
    print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


@pytest.fixture
def gpu(monkeypatch) -> list[bool]:
    """A GPU, as far as torch says; gets what cuDNN's attention is set to."""
    cudnn: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return cudnn


def test_on_a_gpu_attention_is_not_cudnns(gpu):
    assert choose_accelerator()
    assert gpu == [False]


def test_ds_accelerator_leaves_a_gpu_alone(gpu, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not choose_accelerator()
    assert gpu == []


@pytest.mark.parametrize("seen", ["device", "slurm"])
def test_gpus_that_torch_cannot_use_are_an_error(seen, monkeypatch, tmp_path):
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(group, "FIRST_GPU", tmp_path / "nvidia0")
    if seen == "device":
        (tmp_path / "nvidia0").touch()
    else:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(ValueError, match=rf"torch {re.escape(torch.__version__)} can't use them.*DS_ACCELERATOR=cpu"):
        start_group()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # whoever hides them does not want them
    group._check_gpus_are_used()


def test_tests_see_no_gpu():
    assert (os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")


@pytest.mark.parametrize(
    ("step_timeout", "minutes", "limit"),
    [
        (1800.0, None, timedelta(minutes=31)),
        (8.0, None, timedelta(minutes=11)),  # what is no step, loading for one, may take longer than one
        (0.0, None, timedelta(days=1)),
        (1800.0, "2", timedelta(minutes=2)),
    ],
)
def test_the_watchdog_comes_before_a_collectives_limit(step_timeout, minutes, limit, monkeypatch):
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    if minutes:
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", minutes)
    assert collective_limit(step_timeout) == limit


def test_every_group_has_the_limit():
    without = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DEEPSPEED_TIMEOUT")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, "-c", LIMITS]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=120)
    assert done.stdout.split() == ["2460.0"] * 3, done.stderr


def test_training_hands_on_its_step_timeout(monkeypatch):
    start_group = MagicMock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(train, "start_group", start_group)
    monkeypatch.setattr(train, "Requests", MagicMock())
    with pytest.raises(KeyboardInterrupt):
        train.main(["--model_name_or_path", "m", "--train_file", "f", "--output_dir", "o", "--step_timeout", "900"])
    start_group.assert_called_once_with(1, 900.0)
