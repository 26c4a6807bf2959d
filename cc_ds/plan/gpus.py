"""GPUs and what connects them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU in its vendor's usual node of eight."""

    memory: float
    """GiB."""
    bf16: float
    """Dense FLOP/s of matrix products, without sparsity."""
    hbm: float
    """Bytes per second from its own memory."""
    nvlink: float
    """Bytes per second to the other GPUs of its node, one direction; over PCIe where there is no NVLink."""
    network: float
    """Bytes per second between nodes, of a whole node, one direction."""


# Memory, FLOP/s, HBM and NVLink (half of the sum of both directions): NVIDIA's data sheets of A100, H100 SXM, H200 SXM
# and HGX B200, L40S and A10 (PCIe 4 x16). Network: DGX A100 (8 x 200 Gb/s InfiniBand), DGX H100, H200 and B200 (8 x
# 400 Gb/s); for L40S and A10, which no such node fixes, one card of 200 Gb/s.
GPUS = {
    "a100-40": Gpu(memory=40, bf16=312e12, hbm=1.555e12, nvlink=300e9, network=200e9),
    "a100-80": Gpu(memory=80, bf16=312e12, hbm=2.039e12, nvlink=300e9, network=200e9),
    "h100": Gpu(memory=80, bf16=989e12, hbm=3.35e12, nvlink=450e9, network=400e9),
    "h200": Gpu(memory=141e9 / 2**30, bf16=989e12, hbm=4.8e12, nvlink=450e9, network=400e9),
    "b200": Gpu(memory=180e9 / 2**30, bf16=2250e12, hbm=8e12, nvlink=900e9, network=400e9),
    "l40s": Gpu(memory=48e9 / 2**30, bf16=362e12, hbm=864e9, nvlink=32e9, network=25e9),
    "a10": Gpu(memory=24e9 / 2**30, bf16=125e12, hbm=600e9, nvlink=32e9, network=25e9),
}


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU that CUDA calls so, as in "NVIDIA H100 80GB HBM3"; memory may be that of another variant."""
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name.split('-')[0]}\b", device_name, re.IGNORECASE):
            return gpu
    return None
