"""Attention over packed sequences, as an attention implementation that transformers calls by name.

A packed batch is one row of many segments, one after another, without padding. No position may see another segment.
On CUDA with `flash_attention_2` the library's own variable-length kernels do it; everywhere else this one runs SDPA on
one segment at a time, which costs the attention of each segment and no mask: a block-diagonal mask over the whole row
would cost the square of its length.

Shapes: T packed positions, A attention heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

# Deliberately without a mask function of this name: transformers then builds no mask at all.
PACKED = "cc_ds_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Causal attention within each segment.

    Args:
        query: (1, A, T, D); key, value: (1, A_kv, T, D).
        segment_lengths: tokens of each segment, on the host; they sum to T.
        scaling, dropout, sliding_window, softcap: as the calling model defines them.

    Returns:
        (1, T, A, D) and None.
    """
    assert attention_mask is None, "a packed batch has no mask"
    lengths = list(segment_lengths)
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        if softcap is not None:
            outputs.append(_softcapped(q, k, v, scaling, dropout, sliding_window, softcap))
            continue
        band = _band(q.shape[2], sliding_window, q.device)
        outputs.append(
            functional.scaled_dot_product_attention(
                q, k, v, band, dropout, is_causal=band is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """(length, length) bool: causal and within the window; None where causality alone is the same."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _softcapped(q, k, v, scaling, dropout, window, softcap) -> Tensor:
    """Attention with capped scores (Gemma 2), which SDPA does not have; softmax in float32, as the model's own."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scaling / softcap)
    length = q.shape[2]
    visible = _band(length, window, q.device)
    if visible is None:
        visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return functional.dropout(weights, dropout) @ v


AttentionInterface.register(PACKED, packed_attention)
