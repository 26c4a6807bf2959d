"""FLOPs of a training step, counted: 2 per weight and token forward, as many for each of the two gradients.

Causal attention counts at half the square; a sliding window does not shorten it here. SFT reads each row and takes
logits at its labels; CC-Tuning adds the English prompts, whose last feed-forward block runs at the anchor alone
(METHOD, Training). An embedding is looked up, not multiplied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cc_ds.plan.size import Leaf, ModelSize

METHODS = ("sft", "cc", "cc-nograd")
"""SFT, CC-Tuning, and CC-Tuning with english_grad false."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one row."""

    english: int
    prompt: int
    response: int

    @property
    def target(self) -> int:
        """Tokens of the target row."""
        return self.prompt + self.response


@dataclass(frozen=True, slots=True)
class Pass:
    """FLOPs of one pass over one segment."""

    forward: float
    backward: float
    recompute: float
    """What activation checkpointing runs again: every layer but its last matrix."""


def segment_flops(size: ModelSize, length: int, labels: int, last_ffn_at: int | None = None) -> Pass:
    """One segment of `length` tokens with logits at `labels` of them.

    Args:
        last_ffn_at: positions at which the last layer's feed-forward block runs; None: all.
    """
    ffn = set(size.ffn)
    last = len(size.layers) - 1
    forward = trained = recompute = 0.0
    for index, layer in enumerate(size.layers):
        for leaf in layer:
            tokens = last_ffn_at if index == last and last_ffn_at is not None and leaf.name in ffn else length
            forward += 2 * tokens * _multiplied(leaf)
            trained += 2 * tokens * _multiplied(leaf, trainable=True)
        recompute -= 2 * length * _multiplied(_last_matrix(layer)) if last_ffn_at is None or index != last else 0.0
    recompute += forward
    # QK^T and AV, 2 FLOPs each, over half the square with its diagonal
    scores = len(size.layers) * 2 * length * (length + 1) * size.attention_width
    head = 2 * labels * _multiplied(size.head)
    head_trained = 2 * labels * _multiplied(size.head, trainable=True)
    return Pass(
        forward=forward + scores + head,
        backward=forward + trained + 2 * scores + head + head_trained,
        recompute=recompute + scores,
    )


def step_flops(size: ModelSize, rows: Iterable[Lengths], checkpointing: bool = False) -> dict[str, float]:
    """FLOPs of SFT, CC-Tuning and CC-Tuning without the English gradient on these rows."""
    sft = english_forward = english_backward = 0.0
    for row in rows:
        target = segment_flops(size, row.target, row.response)
        english = segment_flops(size, row.english, 0, last_ffn_at=1)
        sft += target.forward + target.backward + (target.recompute if checkpointing else 0.0)
        english_forward += english.forward
        english_backward += english.backward + (english.recompute if checkpointing else 0.0)
    return {
        "sft": sft,
        "cc": sft + english_forward + english_backward,
        "cc-nograd": sft + english_forward,
    }


def flops_per_token(size: ModelSize, english_grad: bool) -> tuple[float, float]:
    """FLOPs that training must spend on a target token and on an English prompt token, attention scores left out.

    A target token counts with the LM head, as if every one had a label; an English one with the whole last layer.
    """
    layers = sum(_multiplied(leaf) for layer in size.layers for leaf in layer)
    trained = sum(_multiplied(leaf, trainable=True) for layer in size.layers for leaf in layer)
    head = _multiplied(size.head)
    target = 4 * (layers + head) + 2 * (trained + _multiplied(size.head, trainable=True))
    return target, 4 * layers + 2 * trained if english_grad else 2 * layers


def _multiplied(leaf: Leaf, trainable: bool = False) -> float:
    """Weights that one token is multiplied with."""
    return sum(w.numel * w.active for w in leaf.weights if w.matrix and (w.trainable or not trainable))


def _last_matrix(layer: tuple[Leaf, ...]) -> Leaf:
    return [leaf for leaf in layer if any(weight.matrix for weight in leaf.weights)][-1]
