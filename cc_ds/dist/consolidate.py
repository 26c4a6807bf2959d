"""The weights inside a checkpoint that DeepSpeed wrote, one parameter at a time, on one CPU node.

ZeRO 0 to 2: rank 0's model file holds every parameter whole. ZeRO-3: the model files hold shapes alone, and each rank's
optimiser file a slice of every float32 master weight, one after another in flat tensors; a parameter is the slices of
all ranks, joined and cut to its size. A tensor-parallel run has such files for each tensor rank, and says in them which
parameters it split by rows, which by columns and which it left whole. Files are mapped, not read: what is resident is
the parameter at hand.
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
    numbers = sorted({_tensor_rank(file) for file in folder.glob("*mp_rank_*_model_states.pt")})
    if not numbers:
        raise ValueError(f"{folder}: no *_model_states.pt there; name a checkpoint-N folder")
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{folder}: files of tensor ranks {numbers} alone; take another checkpoint")
    ranks = [_TensorRank.of(folder, number) for number in numbers]
    split = _Split(ranks[0].models[0]) if len(ranks) > 1 else None
    if ranks[0].flats:
        return _sliced(folder, ranks, split)
    whole = [_whole(rank.models[0]["module"]) for rank in ranks]
    return whole[0] if split is None else [split.joined(parts) for parts in zip(*whole, strict=True)]


@dataclass(frozen=True, slots=True)
class _TensorRank:
    """The files of one tensor rank."""

    models: list[dict[str, Any]]
    """Of each data-parallel rank under ZeRO-3, else one."""
    flats: list[_Flat]
    """The master weights of each data-parallel rank under ZeRO-3, else none."""

    @classmethod
    def of(cls, folder: Path, number: int) -> _TensorRank:
        sliced = sorted(folder.glob(f"zero_pp_rank_*_mp_rank_{number:02d}_model_states.pt"), key=_rank)
        if not sliced:
            return cls([_load(folder / f"mp_rank_{number:02d}_model_states.pt")], [])
        files = sorted(folder.glob(f"*zero_pp_rank_*_mp_rank_{number:02d}_optim_states.pt"), key=_rank)
        optimizers = [_load(file)["optimizer_state_dict"] for file in files]
        ranks = optimizers[0]["partition_count"] if optimizers else 0
        if not len(optimizers) == len(sliced) == ranks:
            raise ValueError(f"{folder}: {len(sliced)} model and {len(optimizers)} optimiser files of {ranks} ranks")
        return cls([_load(file) for file in sliced], [_Flat(each["fp32_flat_groups"]) for each in optimizers])


class _Split:
    """How DeepSpeed's AutoTP split each parameter, as it says itself in a model file."""

    def __init__(self, model: dict[str, Any]) -> None:
        info = model["universal_checkpoint_info"]
        if fused := info["parameter_with_sub_params"]:
            raise ValueError(f"fused weights of a tensor-parallel run can't be joined here: {fused[0]['patterns'][0]}")
        self._replicated, self._by_row = (
            re.compile("|".join(info[key]) or "$^")
            for key in ("tp_replicated_parameter_patterns", "parameter_with_row_parallelism_patterns")
        )

    def leaves_whole(self, name: str) -> bool:
        """Whether every tensor rank has all of a parameter or buffer."""
        return bool(self._replicated.match(name))

    def joined(self, parts: tuple[StoredTensor, ...]) -> StoredTensor:
        """One parameter of its tensor ranks' parts: Megatron's row-parallel weights are cut along their inputs."""
        first = parts[0]
        if self.leaves_whole(first.name):
            return first
        dim = 1 if self._by_row.match(first.name) else 0
        shape = list(first.shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        return StoredTensor(first.name, tuple(shape), lambda: torch.cat([part.read() for part in parts], dim))


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


def _sliced(folder: Path, ranks: list[_TensorRank], split: _Split | None) -> list[StoredTensor]:
    """ZeRO-3: a parameter's slices lie in the files of the data-parallel ranks; of one that tensor parallelism leaves
    whole, in those of all ranks, as the model was partitioned over them all before it was split."""
    # [data rank][tensor rank]: the order of the ranks in the run
    everyone = list(zip(*(rank.flats for rank in ranks), strict=True))
    models = list(zip(*(rank.models for rank in ranks), strict=True))
    result, offsets = [], [0] * len(ranks)

    def add(name: str, shapes: list[torch.Size], slices: Callable[[int, int, int], Callable[[], Tensor]]) -> None:
        """`slices(data rank, tensor rank, size)` reads a slice of so many elements."""
        if split is not None and split.leaves_whole(name):
            size = math.ceil(shapes[0].numel() / (len(ranks) * len(everyone)))
            order = [(data, tensor) for data in range(len(everyone)) for tensor in range(len(ranks))]
            result.append(_joined(name, shapes[0], [slices(*where, size) for where in order]))
            sizes = [size] * len(ranks)
        else:
            sizes = [math.ceil(shape.numel() / len(everyone)) for shape in shapes]
            parts = tuple(
                _joined(name, shape, [slices(data, tensor, sizes[tensor]) for data in range(len(everyone))])
                for tensor, shape in enumerate(shapes)
            )
            result.append(parts[0] if split is None else split.joined(parts))
        for tensor, size in enumerate(sizes):
            offsets[tensor] += size

    def trained(data: int, tensor: int, size: int) -> Callable[[], Tensor]:
        flat, offset = everyone[data][tensor], offsets[tensor]
        return lambda: flat.read(offset, size)

    for groups in zip(*(rank.models[0]["param_shapes"] for rank in ranks), strict=True):
        for name in groups[0]:
            add(name, [group[name] for group in groups], trained)
    if any(flat.size < offset for rank, offset in zip(ranks, offsets, strict=True) for flat in rank.flats):
        raise ValueError(f"{folder}: the optimiser files are too short for the parameters; a damaged checkpoint")
    first = ranks[0].models[0]
    for name in first["frozen_param_shapes"] or {}:

        def frozen(data: int, tensor: int, size: int, name: str = name) -> Callable[[], Tensor]:
            return lambda: models[data][tensor]["frozen_param_fragments"][name].flatten()

        add(name, [rank.models[0]["frozen_param_shapes"][name] for rank in ranks], frozen)
    for name in first["buffer_names"]:
        buffer = first["module"][name]
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


def _tensor_rank(file: Path) -> int:
    return int(re.search(r"mp_rank_(\d+)", file.name)[1])


def _rank(file: Path) -> int:
    return int(re.search(r"zero_pp_rank_(\d+)", file.name)[1])
