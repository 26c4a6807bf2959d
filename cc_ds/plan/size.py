"""What a model is made of, in the order in which a forward uses it; from a model that is real, sharded, or on meta."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from cc_ds.config import CCConfig
from cc_ds.connection.model import CCModelForCausalLM
from cc_ds.dist.zero import whole_numel
from cc_ds.models.arch import decoder_of, family_of, layers_of, text_config


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter as a module holds it; tied ones appear once per module, under the same key."""

    key: int
    numel: int
    matrix: bool
    """Whether tokens are multiplied with it; norms and biases are not."""
    active: float
    """Share of it that one token meets: below 1 for the experts of a mixture."""
    trainable: bool


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module that holds parameters itself: what ZeRO-3 gathers at once."""

    name: str
    weights: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The parts of a causal LM with the connection, and the widths that attention needs."""

    embedding: Leaf
    layers: tuple[tuple[Leaf, ...], ...]
    """The leaves of each layer."""
    ffn: tuple[str, ...]
    """Names of the leaves that belong to feed-forward blocks."""
    norm: tuple[Leaf, ...]
    """What the decoder runs after its layers."""
    head: Leaf
    decision_maker: Leaf | None
    """None for an SFT model without a connection."""
    fuse_layer: int
    hidden_size: int
    vocab_size: int
    attention_width: int
    """Attention heads times head size."""

    @property
    def leaves(self) -> list[Leaf]:
        """All of them, embedding first."""
        middle = [leaf for layer in self.layers for leaf in layer]
        extra = [self.decision_maker] if self.decision_maker else []
        return [self.embedding, *middle, *self.norm, *extra, self.head]

    def numel(self, trainable: bool = False) -> int:
        """Parameters, tied ones once; of those that are trained alone where asked."""
        return sum(self.unique(trainable).values())

    def unique(self, trainable: bool = False) -> dict[int, int]:
        """Elements of every parameter by key."""
        weights = [weight for leaf in self.leaves for weight in leaf.weights]
        return {weight.key: weight.numel for weight in weights if weight.trainable or not trainable}


def size_of(model: nn.Module) -> ModelSize:
    """The size of a causal LM of a known family, connected or stock."""
    config, family = model.config, family_of(model.config.model_type)
    decoder = decoder_of(model, family)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = layers_of(model, family)
    active = _active_share(config)
    in_layers = {id(module) for layer in layers for module in layer.modules()}
    others = [(name, module) for name, module in decoder.named_modules() if id(module) not in in_layers]
    heads = config.num_attention_heads
    return ModelSize(
        embedding=_leaf("embedding", embedding, matrix=False),
        layers=tuple(_leaves(layer, f"layers.{index}.", active) for index, layer in enumerate(layers)),
        ffn=tuple(
            f"layers.{index}.mlp{'.' + name if name else ''}"
            for index, layer in enumerate(layers)
            for name, module in layer.mlp.named_modules()
            if _own(module)
        ),
        norm=tuple(_leaf(name, module) for name, module in others if module is not embedding and _own(module)),
        head=_leaf("head", head),
        decision_maker=_leaf("decision_maker", model.decision_maker) if hasattr(model, "decision_maker") else None,
        fuse_layer=model.cc_config.fuse_layer if hasattr(model, "cc_config") else 0,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        attention_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
    )


def read_config(path_or_id: str) -> PretrainedConfig:
    """The model's config.

    Raises:
        ValueError: none there, or one of a family that is not known.
    """
    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except OSError as error:
        raise ValueError(
            f"{path_or_id}: no config.json there ({str(error).splitlines()[0]}); give --model a folder that holds one"
        ) from error
    config = text_config(config)
    family_of(config.model_type)
    return config


def meta_model(
    config: PretrainedConfig, cc_config: CCConfig | None = None, dtype=torch.bfloat16, lora_rank: int = 0
) -> CCModelForCausalLM:
    """The connected model in training mode with no memory behind it: shapes alone.

    Args:
        lora_rank: above 0, the base weights are frozen and every linear map of the layers has adapters of this rank.

    Raises:
        ValueError: adapters are wanted and peft is not installed.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = CCModelForCausalLM.from_config(config, cc_config=cc_config)
            if lora_rank:
                _add_adapters(model, lora_rank)
    finally:
        torch.set_default_dtype(before)
    return model.train()


def _add_adapters(model: CCModelForCausalLM, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("--lora-rank needs peft: pip install peft") from error
    layer = layers_of(model, model.family)[0]
    names = sorted({name.split(".")[-1] for name, module in layer.named_modules() if isinstance(module, nn.Linear)})
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=names), model)
    model.decision_maker.requires_grad_(True)


def _own(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _leaves(module: nn.Module, prefix: str, active: float) -> tuple[Leaf, ...]:
    found = [(name, part) for name, part in module.named_modules() if _own(part)]
    return tuple(_leaf(prefix + name, part, active=active) for name, part in found)


def _leaf(name: str, module: nn.Module, matrix: bool = True, active: float = 1.0) -> Leaf:
    is_experts = re.search(r"\bexperts\b", name) is not None
    weights = []
    for parameter in module.parameters(recurse=False):
        shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
        weights.append(
            Weight(
                key=id(parameter),
                numel=whole_numel(parameter),
                matrix=matrix and len(shape) > 1,
                active=active if is_experts else 1.0,
                trainable=parameter.requires_grad,
            )
        )
    return Leaf(name, tuple(weights))


def _active_share(config: PretrainedConfig) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0
