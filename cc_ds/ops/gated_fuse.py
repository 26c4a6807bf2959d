"""The fused gate: from English activations to a fused feed-forward output, as one operation.

    d = mean_l english[l] + embedding          (B, H)   what the Decision Maker sees
    z = d @ weight.T                           (B, L)   decision logits
    p = softmax((z + noise) / temperature)     (B, L)
    s = one_hot(argmax p), or p itself         (B, L)   hard (straight-through) or soft gate
    c = sum_l s[l] english[l]                  (B, H)   the connection
    ffn_output[b, anchors[b]] += c[b]

Source: METHOD, steps 3 and 4 of "Training"; CC-Tuning (ACL 2025), section 3.

    gated_fuse       functional; the one for torch.compile
    gated_fuse_      adds in place where autograd allows it: nothing of size (B, T, H) is copied, forward or backward
    gated_fuse_ref   the literal reference

A call checks shapes, converts what is small, and runs the operators of library.py: kernels where they are built, and
where ffn_output, english, embedding and weight have one dtype.

Shapes: B examples, T target positions, L decoder layers, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cc_ds.ops.extension import WITH_KERNEL, say_if_reference
from cc_ds.ops.library import define

_InPlace = define("cc_ds")
_FUNCTIONAL, _IN_PLACE = torch.ops.cc_ds.gated_fuse.default, torch.ops.cc_ds.gated_fuse_.default
_WIDE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


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

    Gradients reach ffn_output (handed through unchanged), english, embedding and weight, from fused and from logits.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a temperature that is not positive.
        RuntimeError: on the CPU, an anchor outside [0, T). On CUDA, where nothing may wait for the device, such an
            anchor stops the kernel, as torch's own indexing does.
    """
    arguments = _arguments(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask)
    if arguments is None:
        return gated_fuse_ref(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask)
    fused, choice, logits, _ = _FUNCTIONAL(*arguments)
    return fused, choice, logits


def gated_fuse_(
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
    """`gated_fuse` for a caller that owns ffn_output and will not read it again.

    ffn_output is changed, and returned as `fused`, where autograd allows that. It does not for a leaf that takes a
    gradient, nor for a view of another tensor; those, mixed dtypes, and code under torch.compile get a copy. If
    autograd still needs the old ffn_output for its backward, the backward raises, as for every in-place operation.
    """
    arguments = None
    if _may_change(ffn_output):
        arguments = _arguments(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask)
    if arguments is None:
        return gated_fuse(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (ffn_output, english, embedding, weight)):
        fused, choice, logits, _ = _InPlace.apply(*arguments)
        return fused, choice, logits
    choice, logits, _ = _IN_PLACE(*arguments)
    return ffn_output, choice, logits


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


def _may_change(ffn_output: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    if not torch.is_grad_enabled():
        return not ffn_output.requires_grad
    return not (ffn_output._is_view() or (ffn_output.requires_grad and ffn_output.is_leaf))


def _arguments(ffn_output, english, embedding, weight, noise, anchors, temperature, hard, mask) -> tuple | None:
    """The operators' arguments; None where the dtypes differ, for which no kernel is written.

    Parts of a model in several dtypes (torch.autocast) are rare, and the rows small.
    """
    if not _fit(ffn_output, english, embedding, weight, noise, anchors, temperature, mask):
        _check(ffn_output, english, embedding, weight, noise, anchors, temperature, mask)
        if any(tensor.dtype != ffn_output.dtype for tensor in (english, embedding, weight)):
            return None
        noise = noise.to(torch.promote_types(ffn_output.dtype, torch.float32))
        anchors, temperature = anchors.to(torch.int64), float(temperature)
    if ffn_output.device.type not in WITH_KERNEL and not torch.compiler.is_compiling():
        say_if_reference(ffn_output.device.type)
    return ffn_output, english, embedding, weight, noise, anchors, mask, temperature, hard


def _fit(ffn_output, english, embedding, weight, noise, anchors, temperature, mask) -> bool:
    """Are the arguments what the operators take, as they are?

    `_check` says what is wrong; this asks as little as it can: a call comes after passes over much memory, when
    Python itself has left the caches, and each step of its own then costs a microsecond.
    """
    if ffn_output.dim() != 3 or english.dim() != 3:
        return False
    batch, _, hidden = ffn_output.shape
    layers, dtype = english.shape[0], ffn_output.dtype
    return (
        english.shape == (layers, batch, hidden)
        and embedding.shape == (batch, hidden)
        and weight.shape == (layers, hidden)
        and noise.shape == (batch, layers)
        and anchors.shape == (batch,)
        and layers > 0
        and hidden > 0
        and english.dtype == embedding.dtype == weight.dtype == dtype
        and noise.dtype == _WIDE.get(dtype)
        and anchors.dtype == torch.int64
        and (mask is None or (mask.dtype == torch.bool and mask.shape == (batch,)))
        and type(temperature) is float
        and temperature > 0
    )


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
    if layers == 0 or hidden == 0:
        raise ValueError(f"gated_fuse: there is nothing to choose from in english {tuple(english.shape)}")
    for name, tensor in {
        "ffn_output": ffn_output,
        "english": english,
        "embedding": embedding,
        "weight": weight,
    }.items():
        if not tensor.is_floating_point():
            raise ValueError(f"gated_fuse: {name} must be floating point, not {tensor.dtype}")
    if anchors.is_floating_point() or anchors.dtype == torch.bool:
        raise ValueError(f"gated_fuse: anchors must be integers, not {anchors.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"gated_fuse: mask must be bool, not {mask.dtype}")
    if not temperature > 0:
        raise ValueError(f"gated_fuse: temperature must be positive, not {temperature}")
