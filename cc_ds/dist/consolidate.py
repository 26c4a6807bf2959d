"""The weights inside a checkpoint that DeepSpeed wrote, one parameter at a time, on one CPU node.

ZeRO 0 to 2: rank 0's model file holds every parameter whole. ZeRO-3: the model files hold shapes alone, and each rank's
optimiser file a slice of every float32 master weight, one after another in flat tensors; a parameter is the slices of
all ranks, joined and cut to its size. Files are mapped, not read: what is resident is the parameter at hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A parameter that can be read when it is wanted."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def stored_tensors(engine_folder: str | Path) -> list[StoredTensor]:
    """Every parameter and persistent buffer of the model, tied ones once.

    Raises:
        ValueError: not a checkpoint of DeepSpeed, one of a layout that is not known here, or one with files missing.
    """
    folder = Path(engine_folder)
    sliced = sorted(folder.glob("zero_pp_rank_*_mp_rank_*_model_states.pt"), key=_rank)
    whole = sorted(folder.glob("mp_rank_*_model_states.pt"))
    if len(whole) > 1 or any("_mp_rank_00_" not in file.name for file in sliced):
        raise ValueError(f"{folder}: written by a tensor-parallel run, whose slices can't be joined here")
    if whole:
        return _whole(_load(whole[0])["module"])
    if not sliced:
        raise ValueError(f"{folder}: no *_model_states.pt there; name a checkpoint-N folder")
    return _sliced(folder, sliced)


def _whole(module: dict[str, Tensor]) -> list[StoredTensor]:
    seen: set[tuple] = set()
    result = []
    for name, tensor in module.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        result.append(StoredTensor(name, tuple(tensor.shape), lambda tensor=tensor: tensor.clone()))
    return result


def _sliced(folder: Path, model_files: list[Path]) -> list[StoredTensor]:
    optimizer_files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
    models = [_load(file) for file in model_files]
    optimizers = [_load(file)["optimizer_state_dict"] for file in optimizer_files]
    ranks = optimizers[0]["partition_count"] if optimizers else 0
    if not len(optimizers) == len(models) == ranks:
        raise ValueError(f"{folder}: {len(models)} model and {len(optimizers)} optimiser files of {ranks} ranks")
    flats = [_Flat(optimizer["fp32_flat_groups"]) for optimizer in optimizers]
    result, offset = [], 0
    for group in models[0]["param_shapes"]:
        for name, shape in group.items():
            size = math.ceil(shape.numel() / ranks)
            result.append(_joined(name, shape, [lambda f=flat, o=offset, s=size: f.read(o, s) for flat in flats]))
            offset += size
    if any(flat.size < offset for flat in flats):
        raise ValueError(f"{folder}: the optimiser files are too short for the parameters; a damaged checkpoint")
    for name, shape in (models[0]["frozen_param_shapes"] or {}).items():
        slices = [lambda m=model, n=name: m["frozen_param_fragments"][n].flatten() for model in models]
        result.append(_joined(name, shape, slices))
    for name in models[0]["buffer_names"]:
        buffer = models[0]["module"][name]
        result.append(StoredTensor(name, tuple(buffer.shape), lambda buffer=buffer: buffer.clone()))
    return result


def _joined(name: str, shape: torch.Size, slices: list[Callable[[], Tensor]]) -> StoredTensor:
    return StoredTensor(
        name, tuple(shape), lambda: torch.cat([read() for read in slices])[: shape.numel()].reshape(shape)
    )


class _Flat:
    """A rank's flat tensors as one."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.size = sum(tensor.numel() for tensor in tensors)

    def read(self, start: int, size: int) -> Tensor:
        parts, begin = [], 0
        for tensor in self.tensors:
            low, high = max(start, begin), min(start + size, begin + tensor.numel())
            if low < high:
                parts.append(tensor[low - begin : high - begin])
            begin += tensor.numel()
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def _load(file: Path) -> dict[str, Any]:
    """A checkpoint file, mapped. Nothing in it can run code: two harmless classes of DeepSpeed's are let through."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    try:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{file}: can't be read ({str(error).splitlines()[0]}); take another checkpoint") from error


def _rank(file: Path) -> int:
    return int(re.search(r"zero_pp_rank_(\d+)", file.name)[1])
