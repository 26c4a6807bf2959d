"""Generate connected: read the prompt once, connect, read again only from the anchor on, decode (METHOD, Inference).

The connection touches one position after layer 0, so keys and values before the anchor do not change. The first read
fills a cache; it is cut at the first anchor of the batch and handed to Hugging Face's generate, whose own prefill reads
the rest with the connection active. With the anchor at the last prompt token that is one token.

Shapes: B examples, T prompt positions, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache


@torch.no_grad()
def generate_connected(
    model,
    plain_generate: Callable,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    anchors: Tensor | None,
    english: tuple[Tensor | None, Tensor | None, Tensor | None],
    **kwargs,
):
    """`plain_generate` with the connection in its prefill.

    Args:
        model: a CCModelForCausalLM with a transform, or any when English prompts are given.
        plain_generate: the stock `generate` of the model.
        input_ids, attention_mask: (B, T), padded on the left.
        anchors: (B,) int64 or None, the last prompt token.
        english: input ids, attention mask (B, T_en) and anchors (B,); the first None: use the transform.
        kwargs: Hugging Face's generation arguments.

    Raises:
        ValueError: right padding, an anchor outside the prompt or on padding, or a cache handed in.
    """
    if kwargs.get("past_key_values") is not None:
        raise ValueError("connected generation fills the cache itself: leave past_key_values out")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    anchors = _checked_anchors(input_ids, attention_mask, anchors)
    if english[0] is not None:
        english_LBH, cache, start = _english_activations(model, english), None, 0
        mask = english[1].any(dim=1) if english[1] is not None else None
    else:
        english_LBH, cache, start = _read_prompt(model, input_ids, attention_mask, anchors)
        mask = None
    # Beams and several returned sequences: generate repeats the prompts, so what was read is repeated here.
    repeats = _repeats(model, kwargs)
    fuse = model.fuse_pass(
        english_LBH.repeat_interleave(repeats, dim=1),
        (anchors - start).repeat_interleave(repeats),
        input_ids.shape[1] - start,
        None if mask is None else mask.repeat_interleave(repeats),
    )
    if cache is not None:
        cache.batch_repeat_interleave(repeats)
        kwargs["past_key_values"] = cache
    model.prefill_pass = fuse
    try:
        return plain_generate(input_ids, attention_mask=attention_mask, **kwargs)
    finally:
        model.prefill_pass = None


def _read_prompt(model, input_ids, attention_mask, anchors) -> tuple[Tensor, DynamicCache | None, int]:
    """First read: E~ = S W at the anchors, and the cache cut at the first anchor, which is `start`."""
    # Without the config, every layer keeps all positions: sliding layers would have dropped what the cut needs.
    cache = DynamicCache()
    positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    source_LBH = model.anchor_activations(
        input_ids, attention_mask, anchors, past_key_values=cache, use_cache=True, position_ids=positions
    )
    wide = model.transform.dtype
    english_LBH = (source_LBH.to(wide) @ model.transform).to(source_LBH.dtype)
    start = int(anchors.min())
    if start == 0:
        return english_LBH, None, 0
    cache.crop(start - input_ids.shape[1])
    return english_LBH, cache, start


def _english_activations(model, english) -> Tensor:
    input_ids, attention_mask, anchors = english
    if attention_mask is not None:
        attention_mask = attention_mask.clone()
        attention_mask[:, 0] |= (~attention_mask.any(dim=1)).to(attention_mask.dtype)
    return model.anchor_activations(input_ids, attention_mask, anchors)


def _checked_anchors(input_ids: Tensor, attention_mask: Tensor, anchors: Tensor | None) -> Tensor:
    batch, length = input_ids.shape
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left for generation (tokenizer.padding_side = 'left')")
    if anchors is None:
        return torch.full((batch,), length - 1, dtype=torch.long, device=input_ids.device)
    if anchors.shape != (batch,):
        raise ValueError(f"anchors must have shape ({batch},), one per prompt, not {tuple(anchors.shape)}")
    inside = (anchors >= 0) & (anchors < length)
    if not bool(inside.all()) or not bool(attention_mask.gather(1, anchors[:, None]).all()):
        raise ValueError(f"anchors {anchors.tolist()} must be prompt positions in [0, {length}), none of them padding")
    return anchors


def _repeats(model, kwargs: dict) -> int:
    config = kwargs.get("generation_config") or model.generation_config

    def setting(name: str) -> int:
        value = kwargs.get(name)
        return (value if value is not None else getattr(config, name, None)) or 1

    return max(setting("num_beams"), setting("num_return_sequences"))
