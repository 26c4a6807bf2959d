"""Shared by all tests: where the golden figures and data lie, and quiet, repeatable libraries."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"

torch.set_num_threads(1)


def pytest_configure(config) -> None:
    """No test sees a GPU, but those of `make test-gpu`: some of a run on CUDA and some on the CPU agree on nothing."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of figures that the authors' own code gave."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the authors' golden figures (../shared/golden) are not on this machine")
    return folder
