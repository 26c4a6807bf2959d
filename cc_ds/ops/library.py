"""The fused gate as torch operators: schemas, plain PyTorch implementations, fakes, autograd.

    gated_fuse            functional, differentiable: copies ffn_output, then gated_fuse_
    gated_fuse_           adds to ffn_output in place; what the kernels implement
    gated_fuse_backward   the gradients of english, embedding and weight; what the kernels implement

`define` takes a namespace, so that a test can put other kernels under the same schemas. Shapes: see gated_fuse.py. The
fourth output, `decision` (B, H), is d of gated_fuse.py; it is kept for the backward.

What moves, in elements, for the hard gate:
    forward    reads english once and 2 B H more; reads and writes B rows of ffn_output
    backward   reads english once, writes its gradient once (L B H each), and hands the gradient of ffn_output through
Nothing of size (B, T, H) moves, except the functional form's copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INPUTS = (
    "Tensor english, Tensor embedding, Tensor weight, Tensor noise, Tensor anchors, Tensor? mask, "
    "float temperature, bool hard"
)
_OUTPUTS = "Tensor choice, Tensor logits, Tensor decision"
SCHEMAS = {
    "gated_fuse": f"(Tensor ffn_output, {_INPUTS}) -> (Tensor fused, {_OUTPUTS})",
    "gated_fuse_": f"(Tensor(a!) ffn_output, {_INPUTS}) -> ({_OUTPUTS})",
    "gated_fuse_backward": (
        "(Tensor? grad_fused, Tensor? grad_logits, Tensor english, Tensor weight, Tensor decision, Tensor logits, "
        "Tensor noise, Tensor choice, Tensor anchors, Tensor? mask, float temperature, bool hard, bool need_english) "
        "-> (Tensor grad_english, Tensor grad_embedding, Tensor grad_weight)"
    ),
}


def define(namespace: str) -> type[torch.autograd.Function]:
    """Define the operators in a namespace; returns the differentiable in-place form."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{namespace}::{name}", schema)
    ops = getattr(torch.ops, namespace)

    def functional(ffn_output: Tensor, *args):
        fused = ffn_output.clone()
        return fused, *ops.gated_fuse_(fused, *args)

    def functional_fake(ffn_output: Tensor, *args):
        return torch.empty_like(ffn_output), *_in_place_fake(ffn_output, *args)

    for name, plain, fake in (
        ("gated_fuse", functional, functional_fake),
        ("gated_fuse_", _in_place_plain, _in_place_fake),
        ("gated_fuse_backward", _backward_plain, _backward_fake),
    ):
        torch.library.impl(f"{namespace}::{name}", "CompositeExplicitAutograd")(plain)
        torch.library.register_fake(f"{namespace}::{name}")(fake)

    def setup_context(ctx, inputs, output):
        _, english, _, weight, noise, anchors, mask, ctx.temperature, ctx.hard = inputs
        _, choice, logits, decision = output
        ctx.save_for_backward(english, weight, decision, logits, noise, choice, anchors, mask)
        ctx.mark_non_differentiable(choice, decision)
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_fused, _choice, grad_logits, _decision):
        need_english, need_embedding, need_weight = ctx.needs_input_grad[1:4]
        grad_english = grad_embedding = grad_weight = None
        if (need_english or need_embedding or need_weight) and not (grad_fused is None and grad_logits is None):
            english, weight, decision, logits, noise, choice, anchors, mask = ctx.saved_tensors
            grad_english, grad_embedding, grad_weight = ops.gated_fuse_backward(
                grad_fused, grad_logits, english, weight, decision, logits, noise, choice, anchors, mask,
                ctx.temperature, ctx.hard, need_english,
            )  # fmt: skip
        return (
            grad_fused,
            grad_english if need_english else None,
            grad_embedding,
            grad_weight,
            *[None] * 5,
        )

    torch.library.register_autograd(f"{namespace}::gated_fuse", backward, setup_context=setup_context)

    class InPlace(torch.autograd.Function):
        """gated_fuse_ with gradients: returns ffn_output itself, choice, logits and decision."""

        @staticmethod
        def forward(ffn_output, *args):
            return ffn_output, *ops.gated_fuse_(ffn_output, *args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            setup_context(ctx, inputs, output)
            ctx.mark_dirty(inputs[0])

    InPlace.backward = staticmethod(backward)
    return InPlace


# ---- plain PyTorch: every device, no kernel ----


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _anchor_index(rows_BTH: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(rows_BTH.shape[0], device=rows_BTH.device), anchors


def _in_place_plain(ffn_output, english, embedding, weight, noise, anchors, mask, temperature, hard):
    wide = _wide(english)
    decision_BH = english.mean(dim=0, dtype=wide) + embedding
    logits = decision_BH @ weight.to(wide).T
    gate = choice = torch.softmax((logits + noise) / temperature, dim=-1)
    if hard:
        index = choice.argmax(dim=-1, keepdim=True)
        gate = torch.zeros_like(choice).scatter(-1, index, 1 + (choice - choice).gather(-1, index))
        choice = torch.zeros_like(choice).scatter(-1, index, 1.0)
    connection_BH = torch.einsum("bl,lbh->bh", gate, english.to(wide))
    index = _anchor_index(ffn_output, anchors)
    row_BH = ffn_output[index]
    fused_BH = (row_BH + connection_BH).to(ffn_output.dtype)
    if mask is not None:
        fused_BH = torch.where(mask[:, None], fused_BH, row_BH)
        choice = torch.where(mask[:, None], choice, 0.0)
    ffn_output[index] = fused_BH
    return choice, logits, decision_BH


def _backward_plain(
    grad_fused, grad_logits, english, weight, decision, logits, noise, choice, anchors, mask, temperature, hard,
    need_english,
):  # fmt: skip
    wide = _wide(english)
    grad_row_BH = torch.zeros_like(decision)
    if grad_fused is not None:
        grad_row_BH = grad_fused[_anchor_index(grad_fused, anchors)].to(wide)
        if mask is not None:
            grad_row_BH = torch.where(mask[:, None], grad_row_BH, 0.0)
    soft = torch.softmax((logits + noise) / temperature, dim=-1)
    grad_gate = torch.einsum("bh,lbh->bl", grad_row_BH, english.to(wide))
    inner = (soft * grad_gate).sum(dim=-1, keepdim=True)
    grad_z = soft * (grad_gate - inner) / temperature
    if grad_logits is not None:
        grad_z = grad_z + grad_logits
    grad_decision_BH = grad_z @ weight.to(wide)
    grad_english = english.new_empty(0)
    if need_english:
        direct = choice.T[:, :, None] * grad_row_BH
        grad_english = (direct + grad_decision_BH / english.shape[0]).to(english.dtype)
    return grad_english, grad_decision_BH.to(english.dtype), (grad_z.T @ decision).to(weight.dtype)


# ---- fakes: shapes and dtypes ----


def _in_place_fake(ffn_output, english, embedding, weight, noise, anchors, mask, temperature, hard):
    layers, batch, hidden = english.shape
    wide = _wide(english)
    return (
        english.new_empty(batch, layers, dtype=wide),
        english.new_empty(batch, layers, dtype=wide),
        english.new_empty(batch, hidden, dtype=wide),
    )


def _backward_fake(
    grad_fused, grad_logits, english, weight, decision, logits, noise, choice, anchors, mask, temperature, hard,
    need_english,
):  # fmt: skip
    layers, batch, hidden = english.shape
    return (
        english.new_empty((layers, batch, hidden) if need_english else (0,)),
        english.new_empty(batch, hidden),
        english.new_empty(layers, hidden),
    )
