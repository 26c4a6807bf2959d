"""Generate connected: read the prompt once, connect, read again only from the anchor on, decode (METHOD, Inference).

The connection touches one position after layer 0, so keys and values before the anchor do not change. The first read
fills a cache; it is cut at the first anchor of the batch and handed to Hugging Face's generate, whose own prefill reads
the rest with the connection active. With the anchor at the last prompt token that is one token.

Shapes: B examples, T prompt positions, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.generation import GenerationMode

# What a row of English is called; "en-GB" and "en_US" are English too.
ENGLISH = ("en", "eng", "english")


@torch.no_grad()
def generate_connected(
    model,
    plain_generate: Callable,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    anchors: Tensor | None,
    english: tuple[Tensor | None, Tensor | None, Tensor | None],
    connected: Tensor,
    languages: Sequence[str | None] | None = None,
    **kwargs,
):
    """`plain_generate` with the connection in its prefill.

    Args:
        model: a CCModelForCausalLM with a transform, or any when English prompts are given.
        plain_generate: the stock `generate` of the model.
        input_ids, attention_mask: (B, T), padded on the left; without a mask, padding is what has the padding token.
        anchors: (B,) int64 or None, the last prompt token.
        english: input ids, attention mask (B, T_en) and anchors (B,); the first None: use the transform.
        connected: (B,) bool; the other rows are read as the stock model reads them.
        languages: B, for a transform with a matrix per language.
        kwargs: Hugging Face's generation arguments, generation_config (or None) among them.

    Raises:
        ValueError: right padding, an anchor outside the prompt or on padding, a cache handed in or switched off, a
            prefill in chunks, continuous batching, or a model that is its own assistant.
    """
    if kwargs.get("past_key_values") is not None:
        raise ValueError("connected generation fills the cache itself: leave past_key_values out")
    # As generate itself merges them: what is given, then the given config, then the model's.
    settings, _ = model._prepare_generation_config(**kwargs)
    if settings.use_cache is False:
        raise ValueError("the connection acts in the prefill and lives on in its cache: pass use_cache=True")
    if settings.prefill_chunk_size is not None:
        raise ValueError("connected generation reads a prompt in one piece: leave prefill_chunk_size out")
    if settings.cache_implementation == "paged":
        raise ValueError("continuous batching does not go through the prefill that connects: leave paged out")
    assistant = kwargs.get("assistant_model")
    if settings.assistant_early_exit is not None or assistant is model:
        raise ValueError(
            "a connected model can't draft for itself: leave assistant_early_exit out, or name another assistant_model"
        )
    attention_mask = _mask(model, settings, input_ids) if attention_mask is None else attention_mask
    anchors = _checked_anchors(input_ids, attention_mask, anchors)
    connected = connected.to(input_ids.device)
    if english[0] is not None:
        english_ids, english_mask, english_anchors = english
        english_mask = _mask(model, settings, english_ids) if english_mask is None else english_mask
        connected = connected & english_mask.any(dim=1)
        english_mask = english_mask.clone()
        english_mask[:, 0] |= (~english_mask.any(dim=1)).to(english_mask.dtype)
        english_LBH, cache, start = model.anchor_activations(english_ids, english_mask, english_anchors), None, 0
    else:
        source_LBH, cache, start = _read_prompt(model, input_ids, attention_mask, anchors)
        if settings.get_generation_mode(assistant) == GenerationMode.ASSISTED_GENERATION:
            cache, start = None, 0  # it reads the whole prompt, whatever the cache holds
        if languages is not None:
            languages = [name if on else None for name, on in zip(languages, connected.tolist(), strict=True)]
        english_LBH = model.transform(source_LBH, languages)
    # Beams and several returned sequences: generate repeats the prompts, so what was read is repeated here.
    repeats = max(settings.num_beams, settings.num_return_sequences)
    fuse = model.fuse_pass(
        english_LBH.repeat_interleave(repeats, dim=1),
        (anchors - start).repeat_interleave(repeats),
        input_ids.shape[1] - start,
        connected.repeat_interleave(repeats),
    )
    if cache is not None:
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        if settings.cache_implementation is None:
            kwargs["past_key_values"], cache = cache, None
    # A cache that was asked for by its kind is made by generate itself, and then filled (CCModelForCausalLM).
    model.prefill_pass, model.prefill_cache = fuse, cache
    try:
        return plain_generate(input_ids, attention_mask=attention_mask, **kwargs)
    finally:
        model.prefill_pass = model.prefill_cache = None


def fill_cache(cache: Cache, kept: Cache) -> None:
    """Put the keys and values of `kept` into an empty cache of any kind."""
    for index, layer in enumerate(kept.layers):
        cache.update(layer.keys, layer.values, index)


def connected_rows(
    rows: int, connect: bool | Tensor, languages: Sequence[str | None] | None, exclude: Sequence[str]
) -> Tensor:
    """(B,) bool: the rows to connect, those of an excluded language left out.

    Raises:
        ValueError: not one language, or one value of `connect`, for each row.
    """
    wanted = torch.as_tensor(connect).cpu().bool()
    if wanted.ndim and wanted.shape != (rows,):
        raise ValueError(f"connect must be one bool or have shape ({rows},), not {tuple(wanted.shape)}")
    if languages is not None and len(languages) != rows:
        raise ValueError(f"languages must name {rows} languages, one for each row, not {len(languages)}")
    excluded = [is_language(name, exclude) for name in languages or [None] * rows]
    return wanted.expand(rows) & ~torch.tensor(excluded)


def is_language(name: str | None, wanted: Sequence[str]) -> bool:
    """Whether a language is one of `wanted`, whatever region or script it adds: en-GB is en."""
    plain = (name or "").lower().replace("_", "-")
    return any(plain == other.lower() or plain.startswith(other.lower() + "-") for other in wanted)


def _read_prompt(model, input_ids, attention_mask, anchors) -> tuple[Tensor, DynamicCache | None, int]:
    """First read: S at the anchors, and the cache cut at the first anchor, which is `start`."""
    # Without the config, every layer keeps all positions: sliding layers would have dropped what the cut needs.
    cache = DynamicCache()
    positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    source_LBH = model.anchor_activations(
        input_ids, attention_mask, anchors, past_key_values=cache, use_cache=True, position_ids=positions
    )
    start = int(anchors.min())
    if start == 0:
        return source_LBH, None, 0
    cache.crop(start - input_ids.shape[1])
    return source_LBH, cache, start


def _mask(model, settings: GenerationConfig, input_ids: Tensor) -> Tensor:
    """(B, T) attention mask, as generate itself infers it: padding, unless the padding token ends answers too."""
    model._prepare_special_tokens(settings, False, input_ids.device, batch_size=input_ids.shape[0])
    return model._prepare_attention_mask_for_generation(input_ids, settings, {})


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
