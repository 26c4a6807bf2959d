"""Where ranks compute, and how long they wait for each other."""

from __future__ import annotations

import os

import pytest
import torch

from cc_ds.dist.group import choose_accelerator


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


def test_tests_see_no_gpu():
    assert (os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
