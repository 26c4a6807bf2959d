"""ZeRO-3 parameters: whole for a moment, without importing deepspeed where there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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
