"""Which kernels run: CUDA and C++ where the package was built with them, plain PyTorch elsewhere.

The shared libraries hold kernels alone and register them with torch when they are loaded; torch's dispatcher then
prefers them to the reference, which stands behind every device (library.py).
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

import torch

_LOG = logging.getLogger(__name__)

_MISSING = {
    "cpu": "it was not built: no C++ compiler, or no torch, where the package was installed",
    "cuda": "it was not built: no nvcc where the package was installed",
}


def _load(device_type: str) -> str | None:
    """Load one library; None, or why its device stays on the reference."""
    if os.environ.get("CC_DS_OPS") == "reference":
        return "the environment variable CC_DS_OPS asks for the reference"
    found = sorted(Path(__file__).parent.glob(f"_{device_type}*.so"))
    if not found:
        return _MISSING[device_type]
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__}: {error}"
    return None


_WHY_REFERENCE = {device_type: _load(device_type) for device_type in ("cpu", "cuda")}

WITH_KERNEL = frozenset(device_type for device_type, why in _WHY_REFERENCE.items() if why is None)


def status() -> dict[str, str]:
    """What the fused gate runs on, by device type.

    Returns:
        {"cpu": ..., "cuda": ...}, each "kernel", or "reference: " and the reason. Where there is a kernel too, a call
        whose tensors are of several dtypes (as under torch.autocast) takes the reference.
    """
    return {device: "kernel" if why is None else f"reference: {why}" for device, why in _WHY_REFERENCE.items()}


@functools.cache
def say_if_reference(device_type: str) -> None:
    """Say once per device type that its kernel is missing, and why; on meta nothing runs, so nothing is missing."""
    if device_type == "meta":
        return
    why = _WHY_REFERENCE.get(device_type, "there is no kernel for this kind of device")
    if why is not None:
        _LOG.warning("gated_fuse runs on plain PyTorch on %s, not on its kernel: %s", device_type, why)
