"""The fused gate: from English activations to a fused feed-forward output, as one operation.

    d = mean_l english[l] + embedding          (B, H)   what the Decision Maker sees
    z = d @ weight.T                           (B, L)   decision logits
    p = softmax((z + noise) / temperature)     (B, L)
    s = one_hot(argmax p), or p itself         (B, L)   hard (straight-through) or soft gate
    c = sum_l s[l] english[l]                  (B, H)   the connection
    ffn_output[b, anchors[b]] += c[b]

Source: METHOD, steps 3 and 4 of "Training"; CC-Tuning (ACL 2025), section 3.

Shapes: B examples, T target positions, L decoder layers, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gated_fuse(
    ffn_output: Tensor,
    english: Tensor,
    embedding: Tensor,
    weight: Tensor,
    noise: Tensor,
    anchors: Tensor,
    temperature: float = 1.0,
    hard: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick one English activation per example and add it to the feed-forward output at the example's anchor.

    Args:
        ffn_output: (B, T, H), floating; what the feed-forward block adds to the residual stream.
        english: (L, B, H), English feed-forward outputs at the English anchor, one per layer.
        embedding: (B, H), the hidden state that enters layer 0 at the target anchor.
        weight: (L, H), the Decision Maker.
        noise: (B, L), added to the logits before the softmax; Gumbel(0, 1) in training, zeros in evaluation.
        anchors: (B,) int64, positions in [0, T).
        temperature: the softmax's tau, positive.
        hard: one-hot forward with the gradient of the softmax (straight-through), or the softmax itself.
        mask: (B,) bool, False for an example that has no English prompt and passes untouched; None: all True.

    Returns:
        fused (B, T, H) in the dtype of ffn_output; choice (B, L), the gate's values (all zero where mask is False),
        and logits (B, L), both float32 or wider. The choice carries no gradient.

    Raises:
        ValueError: shapes that do not fit together, or a temperature that is not positive.
    """
    _check(ffn_output, english, embedding, weight, noise, anchors, temperature, mask)
    return gated_fuse_ref(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask)


def gated_fuse_ref(
    ffn_output: Tensor,
    english: Tensor,
    embedding: Tensor,
    weight: Tensor,
    noise: Tensor,
    anchors: Tensor,
    temperature: float = 1.0,
    hard: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gated_fuse`, literally, in plain PyTorch; every sum in float32 or wider, rounded once at the end."""
    wide = torch.promote_types(ffn_output.dtype, torch.float32)
    english_LBH = english.to(wide)
    decision_BH = english_LBH.mean(dim=0) + embedding.to(wide)
    logits = decision_BH @ weight.to(wide).T
    soft = torch.softmax((logits + noise.to(wide)) / temperature, dim=-1)
    if hard:
        one_hot = torch.zeros_like(soft).scatter(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
        gate = one_hot + (soft - soft.detach())
    else:
        gate = soft
    connection_BH = torch.einsum("bl,lbh->bh", gate, english_LBH)
    choice = (one_hot if hard else soft).detach()
    if mask is not None:
        connection_BH = torch.where(mask[:, None], connection_BH, 0.0)
        choice = torch.where(mask[:, None], choice, 0.0)
    rows = torch.arange(ffn_output.shape[0], device=ffn_output.device)
    anchor_row_BH = ffn_output[rows, anchors].to(wide) + connection_BH
    fused = ffn_output.index_put((rows, anchors), anchor_row_BH.to(ffn_output.dtype))
    return fused, choice, logits


def _check(ffn_output, english, embedding, weight, noise, anchors, temperature, mask) -> None:
    """Shapes only: values are on the device, and reading them would stop it."""
    if ffn_output.dim() != 3 or english.dim() != 3:
        raise ValueError(
            f"gated_fuse: ffn_output must be (B, T, H) and english (L, B, H), "
            f"not {tuple(ffn_output.shape)} and {tuple(english.shape)}"
        )
    batch, _, hidden = ffn_output.shape
    layers = english.shape[0]
    expected = {
        "english": (english, (layers, batch, hidden)),
        "embedding": (embedding, (batch, hidden)),
        "weight": (weight, (layers, hidden)),
        "noise": (noise, (batch, layers)),
        "anchors": (anchors, (batch,)),
        "mask": (mask, (batch,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"gated_fuse: {name} has shape {tuple(tensor.shape)}, expected {shape} "
                f"(ffn_output {tuple(ffn_output.shape)}, english {tuple(english.shape)})"
            )
    if not temperature > 0:
        raise ValueError(f"gated_fuse: temperature must be positive, not {temperature}")
