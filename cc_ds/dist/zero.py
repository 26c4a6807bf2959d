"""Sharded parameters: whole for a moment, without importing deepspeed where there is none; gathered ahead.

ZeRO-3 keeps a part of every parameter on each rank, and tensor parallelism a slice of most weights; under both, a
rank's part is one of its slice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_partitioned(model: nn.Module) -> bool:
    """Whether ranks hold slices of the model's parameters, so that all of them must take part in every forward."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modify: bool = False) -> Iterator[None]:
    """Hold partitioned parameters whole inside the context; plain parameters are left alone.

    With `modify`, what rank 0 writes is what every rank keeps.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None):
        yield


def is_split(parameter: nn.Parameter) -> bool:
    """Whether each rank of a tensor group holds another slice of this parameter."""
    return getattr(parameter, "tensor_model_parallel", False)


def whole_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, whatever part of it is here."""
    if is_split(parameter):
        from deepspeed.checkpoint.constants import DS_AUTOTP_UC_META

        return math.prod(getattr(parameter, DS_AUTOTP_UC_META)["logical_shape"])
    return getattr(parameter, "ds_numel", parameter.numel())


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """Every parameter whole, on the CPU; one module's at a time are gathered. Every rank must call it.

    Args:
        keep: whether this rank wants the result; the others take part and get None.
    """
    if not is_partitioned(model) and not any(map(is_split, model.parameters())):
        return model.state_dict() if keep else None
    whole: dict[int, Tensor] = {}
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        with gathered(parameters), _slices_joined(module, parameters):
            if keep:
                whole |= {id(p): p.detach().cpu().clone() for p in parameters if id(p) not in whole}
    if not keep:
        return None
    # Tied weights stay one tensor under two names, as save_pretrained expects.
    result = {name: whole[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    parameters = set(result)
    return result | {name: value for name, value in model.state_dict().items() if name not in parameters}


@contextmanager
def _slices_joined(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The module's split parameters hold whole weights inside the context, and afterwards the very slices they held."""
    if not any(map(is_split, parameters)):
        yield
        return
    slices = [parameter.data for parameter in parameters]
    module.gather_params(parameters)
    yield
    for parameter, part in zip(parameters, slices):
        parameter.data = part


class GatherOrders:
    """Lets ZeRO-3 gather ahead in every kind of pass of a step.

    DeepSpeed (0.19) records in which order modules ran in a forward and its backward, and gathers ahead as long as the
    next ones follow that order; when they do not, it forgets it, and compares orders over all ranks until it has
    another. A step with an English pass of its own alternates between three orders: English forward, target forward
    and backward, English backward. Here each kind has its own record. Below stage 3 there is nothing to record.
    """

    def __init__(self, engine) -> None:
        self._offload = getattr(engine.optimizer, "parameter_offload", None)
        self._coordinators: dict[str, Any] = {}

    @contextmanager
    def of(self, kind: str, forward: bool = True) -> Iterator[None]:
        """Gather in this kind of pass's order. `forward`: it begins with a forward, where DeepSpeed starts over."""
        if self._offload is None:
            yield
            return
        usual = self._offload.param_coordinator
        if kind not in self._coordinators:
            own = copy.copy(usual)  # the stream and what is in flight stay shared
            own._clear_trace_structures() if own.is_invalid_trace() else own._invalidate_trace()
            self._coordinators[kind] = own
        self._offload.param_coordinator = self._coordinators[kind]
        if not forward:
            self._coordinators[kind].reset_step()
        try:
            yield
        finally:
            self._offload.param_coordinator = usual
