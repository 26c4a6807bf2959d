"""Where each Hugging Face family keeps what the connection needs. Data, no code.

To add a family: name its `model_type` (config.json) and three paths.
    decoder   from the causal LM to the module that runs the layers and has no LM head
    layers    from the decoder to its list of layers
    ffn       from a layer to the module whose output is what the feed-forward block adds to the residual stream:
              the block itself, or the norm or dropout that comes after it
A test in tests/unit/models/test_arch.py then builds a small model of the family and compares with a literal reference.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig


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


TEXT_KEYS = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}
"""Where a multimodal checkpoint has the weights of its text model -> where that alone has them."""
NOT_TEXT_KEYS = [r"vision_tower\.", r"vision_model\.", r"multi_modal_projector\."]
"""What else it has; left behind."""


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The text model's config where `config` is a multimodal model's (Gemma 3 from 4B on, Mistral 3); else itself."""
    text = config.get_text_config(decoder=True)
    if text is config or text.model_type not in FAMILIES:
        return config
    text = copy.deepcopy(text)
    text.tie_word_embeddings = config.tie_word_embeddings  # the outer one counts
    text.dtype = text.dtype or config.dtype
    return text


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
