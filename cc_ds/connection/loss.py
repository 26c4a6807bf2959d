"""The language-model loss over labelled positions only: logits exist for them alone, and never all at once.

Shapes: N labelled positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cc_ds.dist.zero import whole_numel

# 1 GiB of float32 logits, which hold their gradient's place too.
LOGITS_CHUNK = 2**28


def labelled_loss(
    head: nn.Module, hidden_NH: Tensor, labels: Tensor, cap: float | None = None, most_labels: int = 0
) -> Tensor:
    """The summed cross-entropy of N labelled positions; float32 logits of at most LOGITS_CHUNK values live at once.

    With several chunks, each one's logits are computed again in the backward.

    Args:
        head: the LM head, (N, H) -> (N, V).
        labels: (N,) int64, each position's next token.
        cap: logits become `cap * tanh(logits / cap)` (Gemma 2).
        most_labels: N of the rank that has most; the same on every rank. Under ZeRO-3 the ranks gather the head once a
            chunk, all of them or none: so all take as many chunks as that rank needs, and some may be empty.
    """
    # Not head.weight: reading that outside the head's own forward makes DeepSpeed gather it with every pass of the
    # whole model, the English ones too.
    vocabulary = whole_numel(next(head.parameters())) // hidden_NH.shape[1]
    rows = max(1, LOGITS_CHUNK // vocabulary)
    count = -(-max(most_labels, len(labels)) // rows)
    if count <= 1:
        return _chunk_loss(head, hidden_NH, labels, cap)
    chunks = zip(hidden_NH.tensor_split(count), labels.tensor_split(count))
    return sum(checkpoint(_chunk_loss, head, *chunk, cap, use_reentrant=False) for chunk in chunks)


def _chunk_loss(head: nn.Module, hidden_NH: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    logits = head(hidden_NH).float()
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return functional.cross_entropy(logits, labels, reduction="sum")


def liger_loss() -> Callable[..., Tensor]:
    """The same by Liger's fused kernel, which takes the gradient in its forward: no logits are computed twice, and the
    head is gathered once.

    Raises:
        ValueError: liger-kernel is not installed.
    """
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ValueError(f"use_liger_kernel needs pip install liger-kernel ({error})") from error

    def loss(
        head: nn.Module, hidden_NH: Tensor, labels: Tensor, cap: float | None = None, most_labels: int = 0
    ) -> Tensor:
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap)
        # As the head's own forward: ZeRO-3 gathers a weight for the forward of the module that owns it alone.
        head.forward = lambda hidden: fused(head.weight, hidden, labels, head.bias)
        try:
            return head(hidden_NH)
        finally:
            del head.forward

    return loss
