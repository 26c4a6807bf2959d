"""LoRA by peft, in place: the model keeps its class, its hooks and its attention, and learns low-rank updates.

    nn.Linear "q_proj"  ->  lora.Linear "q_proj": base_layer (frozen), lora_A (r, in), lora_B (out, r)
    W x                 ->  W x + (alpha / r) B A x

Everything else is frozen but the Decision Maker, which is trained whole. `merged` folds the updates into the weights
again, so that what is saved is a stock checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cc_ds.config import ModelConfig

_ADAPTER = "default"
_LINEAR_A, _LINEAR_B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def add_lora(model: nn.Module, settings: ModelConfig) -> None:
    """Freeze the model but for its Decision Maker and put adapters beside its linear layers, in place.

    Raises:
        ValueError: peft is not installed, or no layer has a name of `lora_target_modules`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank needs peft: pip install 'cc_ds[lora]'") from error
    names = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if names == ("all-linear",) else list(names),
        exclude_modules=["decision_maker"],  # an nn.Linear too
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    model.decision_maker.requires_grad_(True)


def merged(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`model`'s whole state dict with its adapters folded into the weights, under the stock names.

    The product is taken in float32 or wider and the sum rounded once, to the weight's dtype.
    """
    if not hasattr(model, "peft_config"):
        return state_dict
    config = model.peft_config[_ADAPTER]
    scale = config.lora_alpha / config.r
    result = {}
    for name, tensor in state_dict.items():
        layer = name.partition(".base_layer.")[0]
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            wide = torch.promote_types(tensor.dtype, torch.float32)
            low, high = (state_dict[layer + suffix].to(wide) for suffix in (_LINEAR_A, _LINEAR_B))
            tensor = (tensor.to(wide) + scale * (high @ low)).to(tensor.dtype)
        result[name.replace(".base_layer.", ".")] = tensor
    return result
