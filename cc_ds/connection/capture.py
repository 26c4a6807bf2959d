"""Hooks on a stock model, and the pass that tells them what to do.

A forward through the model is one *pass*. While a pass is active, the hooks hand it the hidden state that enters layer
0, and every layer's FFN input and output; without one they do nothing and the model is its stock self. There are two:

    ReadPass   an English or a target prompt read alone: keep each layer's FFN output at the anchor
    FusePass   target sequences: decide on English activations, add the chosen one to one layer's FFN output

Activation checkpointing calls the FFN hooks again in the backward, long after the pass has ended. The recomputation
therefore runs under the pass that was active when the layer first ran (`Hooks.checkpoint_contexts`): without that, the
hooks would see another pass or none, and torch would raise CheckpointError.

Shapes: B rows of T positions; K anchors in them, one per example (K = B, or B = 1 where examples are packed); L layers;
H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cc_ds.models.arch import Family, ffn_of, layers_of
from cc_ds.ops import capture_row, collect_rows


class Pass(Protocol):
    """What the hooks call during one forward."""

    def on_layer0_input(self, hidden_BTH: Tensor) -> None:
        """The hidden state that enters layer 0. Called once, outside any checkpoint."""

    def on_ffn_input(self, layer: int, input_BTH: Tensor) -> Tensor | None:
        """What enters one layer's feed-forward block; a returned tensor replaces it. Called again at recomputation."""

    def on_ffn_output(self, layer: int, output_BTH: Tensor) -> Tensor | None:
        """One layer's FFN output; a returned tensor replaces it. Called again at every recomputation."""


def flat_positions(anchors: Tensor, length: int) -> Tensor:
    """(B,) anchors of B rows of `length` positions -> (B,) positions counted over all rows."""
    return anchors + length * torch.arange(anchors.shape[0], device=anchors.device)


def take_rows(hidden_BTH: Tensor, positions: Tensor) -> Tensor:
    """(B, T, H), (K,) positions counted over all rows -> (K, H)."""
    return hidden_BTH.flatten(0, 1).index_select(0, positions)


@dataclass(slots=True)
class ReadPass:
    """Keeps every layer's FFN output at K positions (METHOD, Training, step 2).

    Nothing is needed after the last layer's FFN, so that block runs at the K positions alone.
    """

    positions: Tensor
    last_layer: int
    buffer_LKH: Tensor | None = None
    rows: dict[int, Tensor] = field(default_factory=dict)

    def on_layer0_input(self, hidden_BTH: Tensor) -> None:
        return None

    def on_ffn_input(self, layer: int, input_BTH: Tensor) -> Tensor | None:
        return take_rows(input_BTH, self.positions)[None] if layer == self.last_layer else None

    def on_ffn_output(self, layer: int, output_BTH: Tensor) -> Tensor | None:
        last, hidden_size = layer == self.last_layer, output_BTH.shape[-1]
        if layer not in self.rows:  # at recomputation the row is in the buffer, and in the graph
            if self.buffer_LKH is None:
                self.buffer_LKH = output_BTH.new_empty(self.last_layer + 1, self.positions.shape[0], hidden_size)
            output_BTH, self.rows[layer] = capture_row(
                output_BTH, None if last else self.positions, self.buffer_LKH, layer
            )
        # Nobody reads what follows the last layer; zeros that broadcast keep the residual's shape.
        return output_BTH.new_zeros(1, 1, hidden_size) if last else output_BTH

    def activations(self) -> Tensor:
        """(L, K, H), in layer order."""
        return collect_rows(self.buffer_LKH, [self.rows[layer] for layer in sorted(self.rows)])


@dataclass(slots=True)
class FusePass:
    """Decides on the English activations and fuses the chosen one (METHOD, Training, steps 3 and 4)."""

    decision_maker: nn.Module
    english_LKH: Tensor
    positions: Tensor
    noise: Tensor
    fuse_layer: int
    mask: Tensor | None = None
    match_norm: bool = False
    embedding_KH: Tensor | None = None
    choice: Tensor | None = None
    decision_logits: Tensor | None = None
    fusion_ratio: Tensor | None = None

    def on_layer0_input(self, hidden_BTH: Tensor) -> None:
        self.embedding_KH = take_rows(hidden_BTH, self.positions)

    def on_ffn_input(self, layer: int, input_BTH: Tensor) -> None:
        return None

    def on_ffn_output(self, layer: int, output_BTH: Tensor) -> Tensor | None:
        if layer != self.fuse_layer:
            return None
        before_KH = take_rows(output_BTH.detach(), self.positions)
        first = torch.zeros_like(self.positions)
        english_LKH = _with_norm_of(before_KH, self.english_LKH) if self.match_norm else self.english_LKH
        fused_K1H, choice, logits = self.decision_maker(
            before_KH[:, None], english_LKH, self.embedding_KH, self.noise, first, self.mask
        )
        if self.choice is None:
            self.choice, self.decision_logits = choice, logits
            self.fusion_ratio = _ratio(fused_K1H[:, 0].detach(), before_KH)
        if output_BTH._is_view():  # DeepSpeed's all-reduce over a tensor group gives one, which autograd protects
            output_BTH = output_BTH.clone()
        return _ReplaceRows.apply(output_BTH, fused_K1H[:, 0], self.positions)


def _with_norm_of(model_KH: Tensor, values_LKH: Tensor) -> Tensor:
    """The vectors of `values_LKH`, scaled to the norms of those of `model_KH`; a zero vector stays one."""
    wide = torch.promote_types(values_LKH.dtype, torch.float32)
    norms_LK1 = values_LKH.to(wide).norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return (values_LKH * (model_KH.to(wide).norm(dim=-1, keepdim=True) / norms_LK1)).to(values_LKH.dtype)


class _ReplaceRows(torch.autograd.Function):
    """Rows of a tensor become themselves plus something: `hidden[positions] = rows`, in place.

    The rows are computed from the detached tensor, so the gradient of the tensor is handed through unchanged, whole,
    and the rows get theirs; nothing of the tensor's size is made.
    """

    @staticmethod
    def forward(ctx, hidden_BTH: Tensor, rows_KH: Tensor, positions: Tensor) -> Tensor:
        ctx.positions = positions
        ctx.mark_dirty(hidden_BTH)
        hidden_BTH.view(-1, hidden_BTH.shape[-1]).index_copy_(0, positions, rows_KH)
        return hidden_BTH

    @staticmethod
    def backward(ctx, grad_BTH: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_BTH, take_rows(grad_BTH, ctx.positions), None


@torch.no_grad()
def _ratio(fused_KH: Tensor, before_KH: Tensor) -> Tensor:
    """(K,): norm of what is fused over the norm of what it is added to."""
    wide = torch.promote_types(before_KH.dtype, torch.float32)
    added_KH = fused_KH.to(wide) - before_KH.to(wide)
    return added_KH.norm(dim=-1) / before_KH.to(wide).norm(dim=-1).clamp_min(1e-12)


class Hooks:
    """Registers the hooks on a model once and knows the active pass."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        # A plain attribute, not a context variable: on CUDA the backward, and so the recomputation, runs in
        # autograd's own thread, which would see another context.
        self.active: Pass | None = None
        layers = layers_of(model, family)
        layers[0].register_forward_pre_hook(self._layer0_input, with_kwargs=True)
        for index, layer in enumerate(layers):
            # Bound methods, not closures: a copied model has hooks that know its own pass.
            layer.mlp.register_forward_pre_hook(functools.partial(self._ffn_input, index))
            ffn_of(layer, family).register_forward_hook(functools.partial(self._ffn_output, index))

    def _layer0_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.active is not None:
            self.active.on_layer0_input(args[0] if args else kwargs["hidden_states"])

    def _ffn_input(self, layer: int, module: nn.Module, args: tuple) -> tuple | None:
        changed = None if self.active is None else self.active.on_ffn_input(layer, args[0])
        return None if changed is None else (changed, *args[1:])

    def _ffn_output(self, layer: int, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self.active is None else self.active.on_ffn_output(layer, output)

    @contextmanager
    def during(self, current: Pass | None) -> Iterator[None]:
        """Make `current` the active pass."""
        previous, self.active = self.active, current
        try:
            yield
        finally:
            self.active = previous

    def checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """`context_fn` for non-reentrant checkpointing: recompute under the pass that is active now."""
        return self.during(self.active), self.during(self.active)
