"""Capturing: each layer's FFN output at the anchors, straight into one (L, K, H) buffer.

    for every layer l:   ffn_output, row = capture_row(ffn_output, positions, buffer, l)    # go on with ffn_output
    english = collect_rows(buffer, rows)                                                    # (L, K, H), differentiable

Forward, a layer costs one gather of K rows into their place: no stack, no view that keeps a layer's output alive.
Backward, `collect_rows` hands each layer a view of the buffer's gradient, and `capture_row` adds it to the anchor rows
of the gradient that comes from the layers above: one copy of that gradient (autograd shares it with the residual
stream, so it may not be written to), in place of zeros of the same size and a sum. Only where nothing comes from above
are zeros made.

Under activation checkpointing a layer's forward runs again in the backward. It must then not capture: the row is in the
buffer, and english has been saved from it. Nothing is saved for autograd here, so leaving the call out is allowed.

Shapes: B rows of T positions; K anchors in them; L layers; H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def capture_row(ffn_output: Tensor, positions: Tensor | None, buffer: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Write the rows of one layer's FFN output at K positions to `buffer[layer]`.

    Args:
        ffn_output: (B, T, H).
        positions: (K,) int64, counted over all rows, so in [0, B T), no two equal; None: all of them (K = B T).
        buffer: (L, K, H) in the dtype and on the device of ffn_output; takes no gradient.
        layer: in [0, L).

    Returns:
        ffn_output, with which the layer must go on, and a tensor (K, H) without memory that stands for the row, for
        `collect_rows`.
    """
    return _CaptureRow.apply(ffn_output, positions, buffer, layer)


def collect_rows(buffer: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The filled buffer (L, K, H) as a differentiable function of what `capture_row` returned, layer by layer.

    Raises:
        ValueError: not one row per layer.
    """
    if len(rows) != buffer.shape[0]:
        raise ValueError(f"collect_rows: {len(rows)} rows were captured for a buffer of {buffer.shape[0]} layers")
    return _CollectRows.apply(buffer, *rows)


def capture_rows_ref(ffn_outputs: Sequence[Tensor], positions: Tensor) -> Tensor:
    """The same (L, K, H), literally: index each (B, T, H) and stack."""
    return torch.stack([ffn_output.flatten(0, 1)[positions] for ffn_output in ffn_outputs])


class _CaptureRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ffn_output, positions, buffer, layer):
        row = buffer[layer]
        flat = ffn_output.reshape(-1, ffn_output.shape[-1])
        if positions is None:
            row.copy_(flat)
        else:
            torch.index_select(flat, 0, positions, out=row)
        # Kept as an attribute: what is saved for autograd would have to be saved at recomputation too.
        ctx.positions, ctx.shape = positions, ffn_output.shape
        ctx.set_materialize_grads(False)
        # A tensor without memory stands for the row: a view of the buffer may not see the next layer's write.
        return ffn_output.view_as(ffn_output), buffer.new_empty(()).expand(row.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, grad_row):
        if grad_row is None:
            return grad_output, None, None, None
        if ctx.positions is None:
            grad_row = grad_row.view(ctx.shape)
            return grad_row if grad_output is None else grad_output + grad_row, None, None, None
        if grad_output is None:
            grad_input = grad_row.new_zeros(ctx.shape)
        else:
            grad_input = grad_output.clone(memory_format=torch.contiguous_format)
        flat = grad_input.view(-1, ctx.shape[-1])
        if grad_output is not None:
            # select, add and copy, not index_add: that would use atomics, though no two rows meet
            grad_row = grad_row + flat.index_select(0, ctx.positions)
        flat.index_copy_(0, ctx.positions, grad_row)
        return grad_input, None, None, None


class _CollectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, *rows):
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, *grad.contiguous().unbind(0)
