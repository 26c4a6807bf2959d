"""Hooks on a stock model, and the pass that tells them what to do.

A forward through the model is one *pass*. While a pass is active, the hooks hand it the hidden state that enters layer
0 and every layer's FFN output; without one they do nothing and the model is its stock self. Two passes exist:

    ReadPass   an English or a target prompt read alone: keep each layer's FFN output at the anchor
    FusePass   a target sequence: decide on English activations, add the chosen one to one layer's FFN output

Activation checkpointing calls the FFN hooks again in the backward, long after the pass has ended. The recomputation
therefore runs under the pass that was active when the layer first ran (`Hooks.checkpoint_contexts`): without that, the
hooks would see another pass or none, and torch would raise CheckpointError.

Shapes: B examples, T positions, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from cc_ds.models.arch import Family, ffn_of, layers_of


class Pass(Protocol):
    """What the hooks call during one forward."""

    def on_layer0_input(self, hidden_BTH: Tensor) -> None:
        """The hidden state that enters layer 0. Called once, outside any checkpoint."""

    def on_ffn_output(self, layer: int, output_BTH: Tensor) -> Tensor | None:
        """One layer's FFN output; a returned tensor replaces it. Called again at every recomputation."""


def take_anchor_rows(hidden_BTH: Tensor, anchors: Tensor) -> Tensor:
    """(B, T, H), (B,) -> (B, H): each example's row at its anchor."""
    return hidden_BTH[torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device), anchors]


@dataclass(slots=True)
class ReadPass:
    """Keeps every layer's FFN output at the anchor (METHOD, Training, step 2)."""

    anchors: Tensor
    rows: dict[int, Tensor] = field(default_factory=dict)

    def on_layer0_input(self, hidden_BTH: Tensor) -> None:
        return None

    def on_ffn_output(self, layer: int, output_BTH: Tensor) -> None:
        row_BH = take_anchor_rows(output_BTH, self.anchors)
        # At recomputation the same tensor comes again; the first one is the one in the graph.
        self.rows.setdefault(layer, row_BH)

    def activations(self) -> Tensor:
        """(L, B, H), in layer order."""
        return torch.stack([self.rows[layer] for layer in sorted(self.rows)])


@dataclass(slots=True)
class FusePass:
    """Decides on the English activations and fuses the chosen one (METHOD, Training, steps 3 and 4)."""

    decision_maker: nn.Module
    english_LBH: Tensor
    anchors: Tensor
    noise: Tensor
    fuse_layer: int
    mask: Tensor | None = None
    embedding_BH: Tensor | None = None
    choice: Tensor | None = None
    decision_logits: Tensor | None = None
    fusion_ratio: Tensor | None = None

    def on_layer0_input(self, hidden_BTH: Tensor) -> None:
        self.embedding_BH = take_anchor_rows(hidden_BTH, self.anchors)

    def on_ffn_output(self, layer: int, output_BTH: Tensor) -> Tensor | None:
        if layer != self.fuse_layer:
            return None
        fused_BTH, choice, logits = self.decision_maker(
            output_BTH, self.english_LBH, self.embedding_BH, self.noise, self.anchors, self.mask
        )
        if self.choice is None:
            self.choice, self.decision_logits = choice, logits
            self.fusion_ratio = self._ratio(output_BTH, choice)
        return fused_BTH

    @torch.no_grad()
    def _ratio(self, output_BTH: Tensor, choice: Tensor) -> Tensor:
        """(B,): norm of what is fused over the norm of what it is added to."""
        connection_BH = torch.einsum("bl,lbh->bh", choice, self.english_LBH.to(choice.dtype))
        before_BH = take_anchor_rows(output_BTH, self.anchors).to(choice.dtype)
        return connection_BH.norm(dim=-1) / before_BH.norm(dim=-1).clamp_min(1e-12)


class Hooks:
    """Registers the hooks on a model once and knows the active pass."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        # A plain attribute, not a context variable: on CUDA the backward, and so the recomputation, runs in
        # autograd's own thread, which would see another context.
        self.active: Pass | None = None
        layers = layers_of(model, family)
        layers[0].register_forward_pre_hook(self._layer0_input, with_kwargs=True)
        for index, layer in enumerate(layers):
            ffn_of(layer, family).register_forward_hook(self._ffn_output(index))

    def _layer0_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.active is not None:
            self.active.on_layer0_input(args[0] if args else kwargs["hidden_states"])

    def _ffn_output(self, layer: int):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            return None if self.active is None else self.active.on_ffn_output(layer, output)

        return hook

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
