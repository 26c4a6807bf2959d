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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MASTER, STATES = "fp32", ("fp32", "exp_avg", "exp_avg_sq")
"""A trained parameter's float32 weight, and all that Adam keeps of it, in DeepSpeed's words."""


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
    ranks, split = _read(folder)
    if ranks[0].optimizers:
        return _trained(folder, ranks, split, MASTER) + _frozen_and_buffers(ranks, split)
    whole = [_whole(rank.models[0]["module"]) for rank in ranks]
    return whole[0] if split is None else [split.joined(parts) for parts in zip(*whole, strict=True)]


def trained_states(engine_folder: str | Path) -> Iterator[tuple[str, dict[str, StoredTensor]]]:
    """Of a ZeRO-3 checkpoint, each trained parameter's master weight and both moments, by the names in STATES.

    Raises:
        ValueError: as `stored_tensors`.
    """
    folder = Path(engine_folder)
    ranks, split = _read(folder)
    for tensors in zip(*(_trained(folder, ranks, split, state) for state in STATES), strict=True):
        yield tensors[0].name, dict(zip(STATES, tensors, strict=True))


def common_optimizer_state(engine_folder: str | Path) -> dict[str, Any]:
    """What the optimiser files of a ZeRO-3 checkpoint say alike: groups, step, loss scale; without the tensors."""
    ranks, _ = _read(Path(engine_folder))
    whole = ranks[0].optimizers[0]
    inner = whole["optimizer_state_dict"]
    step = {0: {"step": inner["state"][0]["step"]}}
    common = {key: value for key, value in whole.items() if key != "fp32_flat_groups"}
    return common | {"param_groups": inner["param_groups"], "optimizer_state_dict": inner | {"state": step}}


def _read(folder: Path) -> tuple[list[_TensorRank], _Split | None]:
    numbers = sorted({_tensor_rank(file) for file in folder.glob("*mp_rank_*_model_states.pt")})
    if not numbers:
        raise ValueError(f"{folder}: no *_model_states.pt there; name a checkpoint-N folder")
    if numbers != list(range(len(numbers))):
        raise ValueError(f"{folder}: files of tensor ranks {numbers} alone; take another checkpoint")
    ranks = [_TensorRank.of(folder, number) for number in numbers]
    split = _Split(ranks[0].models[0]) if len(ranks) > 1 else None
    return ranks, split


@dataclass(frozen=True, slots=True)
class _TensorRank:
    """The files of one tensor rank."""

    models: list[dict[str, Any]]
    """Of each data-parallel rank under ZeRO-3, else one."""
    optimizers: list[dict[str, Any]]
    """The optimiser's state of each data-parallel rank under ZeRO-3, else none."""

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
        return cls([_load(file) for file in sliced], optimizers)

    def flats(self, state: str) -> list[_Flat]:
        """One state of all trained parameters, flat, of each data-parallel rank."""
        if state == MASTER:
            return [_Flat(optimizer["fp32_flat_groups"]) for optimizer in self.optimizers]
        groups = (optimizer["optimizer_state_dict"]["state"] for optimizer in self.optimizers)
        return [_Flat([group[number][state] for number in sorted(group)]) for group in groups]


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


def _trained(folder: Path, ranks: list[_TensorRank], split: _Split | None, state: str) -> list[StoredTensor]:
    """ZeRO-3: slice after slice of all trained parameters lies in one flat tensor of each rank."""
    flats = list(zip(*(rank.flats(state) for rank in ranks), strict=True))
    result, offsets = [], [0] * len(ranks)
    for groups in zip(*(rank.models[0]["param_shapes"] for rank in ranks), strict=True):
        for name in groups[0]:
            starts = tuple(offsets)

            def read(data: int, tensor: int, size: int, starts: tuple[int, ...] = starts) -> Tensor:
                return flats[data][tensor].read(starts[tensor], size)

            parameter, sizes = _sliced(name, [group[name] for group in groups], len(flats), split, read)
            result.append(parameter)
            offsets = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    if any(flat.size < offset for row in flats for flat, offset in zip(row, offsets, strict=True)):
        raise ValueError(f"{folder}: the optimiser files are too short for the parameters; a damaged checkpoint")
    return result


def _frozen_and_buffers(ranks: list[_TensorRank], split: _Split | None) -> list[StoredTensor]:
    """ZeRO-3: what is not trained lies in the model files, frozen parameters in slices, buffers whole."""
    result, first = [], ranks[0].models[0]
    for name in first["frozen_param_shapes"] or {}:

        def read(data: int, tensor: int, size: int, name: str = name) -> Tensor:
            return ranks[tensor].models[data]["frozen_param_fragments"][name].flatten()

        shapes = [rank.models[0]["frozen_param_shapes"][name] for rank in ranks]
        result.append(_sliced(name, shapes, len(ranks[0].models), split, read)[0])
    for name in first["buffer_names"]:
        buffer = first["module"][name]
        result.append(StoredTensor(name, tuple(buffer.shape), lambda buffer=buffer: buffer.clone()))
    return result


def _sliced(
    name: str, shapes: list[torch.Size], data_size: int, split: _Split | None, read: Callable[[int, int, int], Tensor]
) -> tuple[StoredTensor, list[int]]:
    """A parameter of its slices, and how large a slice is on each tensor rank.

    Slices lie with the data-parallel ranks; of a parameter that tensor parallelism leaves whole, with all ranks, as
    the model is partitioned over them all before it is split.

    Args:
        shapes: what each tensor rank has of it.
        read: (data rank, tensor rank, size) -> the slice.
    """
    if split is not None and split.leaves_whole(name):
        size = math.ceil(shapes[0].numel() / (len(shapes) * data_size))
        order = [(data, tensor) for data in range(data_size) for tensor in range(len(shapes))]
        parts = [lambda d=data, t=tensor: read(d, t, size) for data, tensor in order]
        return _joined(name, shapes[0], parts), [size] * len(shapes)
    sizes = [math.ceil(shape.numel() / data_size) for shape in shapes]
    of_ranks = [
        _joined(name, shape, [lambda d=data, t=tensor: read(d, t, sizes[t]) for data in range(data_size)])
        for tensor, shape in enumerate(shapes)
    ]
    return of_ranks[0] if split is None else split.joined(tuple(of_ranks)), sizes


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


def load_without_code(file: str | Path, **options) -> Any:
    """torch.load of what DeepSpeed saved. Nothing in it can run code: its harmless classes alone are let through."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(file, weights_only=True, **options)


def _load(file: Path) -> dict[str, Any]:
    """A checkpoint file, mapped."""
    try:
        return load_without_code(file, map_location="cpu", mmap=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{file}: can't be read ({str(error).splitlines()[0]}); take another checkpoint") from error


def _tensor_rank(file: Path) -> int:
    return int(re.search(r"mp_rank_(\d+)", file.name)[1])


def _rank(file: Path) -> int:
    return int(re.search(r"zero_pp_rank_(\d+)", file.name)[1])
