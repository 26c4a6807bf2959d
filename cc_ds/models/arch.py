"""Where each Hugging Face family keeps what the connection needs. Data, no code.

To add a family: name its `model_type` (config.json) and three paths.
    decoder   from the causal LM to the module that runs the layers and has no LM head
    layers    from the decoder to its list of layers
    ffn       from a layer to the module whose output is what the feed-forward block adds to the residual stream:
              the block itself, or the norm or dropout that comes after it
A test in tests/unit/models/test_arch.py then builds a small model of the family and compares with a literal reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Family:
    """Module paths of one model family."""

    decoder: str = "model"
    layers: str = "layers"
    ffn: str = "mlp"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "mixtral": Family(),
    "qwen3_moe": Family(),
    "gemma2": Family(ffn="post_feedforward_layernorm"),
    "gemma3_text": Family(ffn="post_feedforward_layernorm"),
    "olmo2": Family(ffn="post_feedforward_layernorm"),
    "phi3": Family(ffn="resid_mlp_dropout"),
    "gpt_neox": Family(decoder="gpt_neox", ffn="post_mlp_dropout"),
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`.

    Raises:
        ValueError: an unknown family; the message says what to add and where.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"model family {model_type!r} is not known. Known: {', '.join(sorted(FAMILIES))}. To add it, put one line "
            f"into FAMILIES in cc_ds/models/arch.py: {model_type!r}: Family(decoder=..., layers=..., ffn=...), where "
            f"ffn is the module of a layer whose output the feed-forward block adds to the residual stream "
            f"(CONTRIBUTING.md, 'Add a family')."
        )
    return FAMILIES[model_type]


def decoder_of(model: nn.Module, family: Family) -> nn.Module:
    """The module that runs the layers: embeddings in, last hidden state out, no LM head."""
    return model.get_submodule(family.decoder)


def layers_of(model: nn.Module, family: Family) -> nn.ModuleList:
    """The decoder's layers, in order."""
    return decoder_of(model, family).get_submodule(family.layers)


def ffn_of(layer: nn.Module, family: Family) -> nn.Module:
    """The module of one layer whose output is the layer's FFN output."""
    return layer.get_submodule(family.ffn)
