"""The table of GPUs finds a device by the name that CUDA gives it."""

from __future__ import annotations

import pytest

from cc_ds.plan.gpus import GPUS, gpu_named


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_known(name, key):
    assert gpu_named(name).bf16 == GPUS[key].bf16


def test_unknown():
    assert gpu_named("NVIDIA A10G") is None  # less than half of an A10
    assert gpu_named("Tesla T4") is None
