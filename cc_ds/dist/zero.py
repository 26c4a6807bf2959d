"""ZeRO-3 parameters: whole for a moment, without importing deepspeed where there is none; gathered ahead."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


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


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """Every parameter whole, on the CPU; one parameter at a time is gathered. Every rank must call it.

    Args:
        keep: whether this rank wants the result; the others take part and get None.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return model.state_dict() if keep else None
    whole: dict[int, Tensor] = {}
    for parameter in model.parameters():
        with gathered([parameter]):
            if keep:
                whole[id(parameter)] = parameter.detach().cpu().clone()
    if not keep:
        return None
    # Tied weights stay one tensor under two names, as save_pretrained expects.
    result = {name: whole[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    parameters = set(result)
    return result | {name: value for name, value in model.state_dict().items() if name not in parameters}


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
        """Gather in the order of this kind of pass. `forward`: it begins with a forward, where DeepSpeed starts over."""
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
