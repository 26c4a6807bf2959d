"""LoRA by peft, in place: the model keeps its class, its hooks and its attention, and learns low-rank updates.

    nn.Linear "q_proj"  ->  lora.Linear "q_proj": base_layer (frozen), lora_A (r, in), lora_B (out, r)
    W x                 ->  W x + (alpha / r) B A x

Everything else is frozen but the Decision Maker, which is trained whole. `merged` folds the updates into the weights
again, so that what is saved is a stock checkpoint.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from cc_ds.config import ModelConfig
from cc_ds.dist.consolidate import StoredTensor

_ADAPTER = "default"
_LINEAR_A, _LINEAR_B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def add_lora(model: nn.Module, settings: ModelConfig) -> None:
    """Freeze the model but for its connection and put adapters beside its linear layers, in place.

    Raises:
        ValueError: peft is not installed, or a name of `lora_target_modules` is of no layer, of one that is not
            nn.Linear, or of an LM head that is tied to the embeddings.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ValueError("lora_rank needs peft: pip install 'cc_ds[lora]'") from error
    names = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if names == ("all-linear",) else list(names),
        exclude_modules=["decision_maker", "trained_transform"],  # nn.Linear too
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    # peft adapts embeddings and others too, with factors of other names and shapes, which `merged` does not know.
    adapted = {name: layer.get_base_layer() for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    others = [f"{name} ({type(layer).__name__})" for name, layer in adapted.items() if not isinstance(layer, nn.Linear)]
    if others:
        what = f"lora_target_modules {' '.join(names)} matches {', '.join(others[:3])}"
        raise ValueError(f"{what}; name nn.Linear layers alone, as adapters of others can't be merged into the export")
    embeddings = model.get_input_embeddings().weight
    if any(layer.weight is embeddings for layer in adapted.values()):
        raise ValueError(
            "lora_target_modules matches the LM head, whose weight is the embeddings' too (tied): merged into one it "
            "would change the other; leave it out"
        )
    model.decision_maker.requires_grad_(True)


def merged(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`model`'s whole state dict with its adapters folded into the weights, under the stock names."""
    scale = lora_scale(model)
    if scale is None:
        return state_dict
    parts = [StoredTensor(name, tuple(tensor.shape), lambda t=tensor: t) for name, tensor in state_dict.items()]
    return {part.name: part.read() for part in merged_when_read(parts, scale)}


def lora_scale(model: nn.Module) -> float | None:
    """What the model's updates are scaled by; None: it has no adapters."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[_ADAPTER]
    return config.lora_alpha / config.r


def merged_when_read(tensors: list[StoredTensor], scale: float) -> list[StoredTensor]:
    """The same for tensors that are not in memory: a weight is folded when it is read, with its own two factors.

    The product is taken in float32 or wider and the sum rounded once, to the weight's dtype.
    """
    by_name = {tensor.name: tensor for tensor in tensors}

    def fold(weight: StoredTensor, low: StoredTensor, high: StoredTensor) -> Tensor:
        base = weight.read()
        wide = torch.promote_types(base.dtype, torch.float32)
        return (base.to(wide) + scale * (high.read().to(wide) @ low.read().to(wide))).to(base.dtype)

    result = []
    for tensor in tensors:
        if ".lora_" in tensor.name:
            continue
        layer, base, rest = tensor.name.partition(".base_layer.")
        read = tensor.read
        if base and rest == "weight":
            read = functools.partial(fold, tensor, by_name[layer + _LINEAR_A], by_name[layer + _LINEAR_B])
        result.append(StoredTensor(f"{layer}.{rest}" if base else tensor.name, tensor.shape, read))
    return result
