"""One list of inputs for every test of the fused gate: sizes around the kernels' boundaries, layouts, masks, ties.

`expected` gives what is right: the literal reference and its autograd, in float64 on the same, already rounded numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cc_ds.ops import gated_fuse_ref

# Results are rounded once, from sums in float32 (float64): half a unit in the last place of the dtype, and the sums'
# own error, relative to the largest value of the tensor.
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUMS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}

GRADIENTS = ("ffn_output", "english", "embedding", "weight")


@dataclass(frozen=True)
class Sample:
    """Sizes and peculiarities; `inputs` makes the tensors, always the same ones."""

    batch: int = 3
    positions: int = 5
    layers: int = 4
    hidden: int = 64
    dtype: torch.dtype = torch.float32
    hard: bool = True
    temperature: float = 1.0
    mask: str = "none"
    """none, some, all (rows without English)"""
    layout: str = "contiguous"
    """contiguous, unaligned, strided, transposed"""
    numbers: str = "normal"
    """normal, tied (all logits equal), large (the softmax saturates)"""

    @property
    def name(self) -> str:
        plain = Sample()
        parts = [f"B{self.batch}T{self.positions}L{self.layers}H{self.hidden}", str(self.dtype).removeprefix("torch.")]
        parts.append("hard" if self.hard else "soft")
        parts += [
            getattr(self, field) for field in ("layout", "numbers") if getattr(self, field) != getattr(plain, field)
        ]
        parts += [f"mask_{self.mask}"] if self.mask != "none" else []
        parts += [f"tau{self.temperature}"] if self.temperature != 1.0 else []
        return "-".join(parts)

    def inputs(self, seed: int = 0) -> dict:
        """Keyword arguments of gated_fuse."""
        draw = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(self.dtype, torch.float32)

        def normal(*shape, scale=1.0):
            return (scale * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(self.dtype)

        weight_scale = {"normal": 1.0, "tied": 0.0, "large": 300.0}[self.numbers]
        tensors = {
            "ffn_output": normal(self.batch, self.positions, self.hidden),
            "english": normal(self.layers, self.batch, self.hidden),
            "embedding": normal(self.batch, self.hidden),
            "weight": normal(self.layers, self.hidden, scale=weight_scale / self.hidden**0.5),
        }
        noise = torch.randn(self.batch, self.layers, generator=draw, dtype=torch.float64).to(wide)
        return {
            **{name: _laid_out(tensor, self.layout) for name, tensor in tensors.items()},
            "noise": torch.zeros_like(noise) if self.numbers == "tied" else noise,
            "anchors": torch.randint(0, self.positions, (self.batch,), generator=draw),
            "mask": _mask(self.mask, self.batch),
            "temperature": self.temperature,
            "hard": self.hard,
        }

    def incoming(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Gradients that come in through fused and through logits."""
        draw = torch.Generator().manual_seed(seed)
        wide = torch.promote_types(self.dtype, torch.float32)
        fused = torch.randn(self.batch, self.positions, self.hidden, generator=draw).to(self.dtype)
        return _laid_out(fused, self.layout), torch.randn(self.batch, self.layers, generator=draw).to(wide)


def _mask(kind: str, batch: int) -> Tensor | None:
    if kind == "none":
        return None
    return torch.arange(batch) % 2 == 0 if kind == "some" else torch.zeros(batch, dtype=torch.bool)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "contiguous" or tensor.numel() == 0:
        return tensor
    if layout == "unaligned":  # starts one element after a multiple of 16 bytes
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return memory[1:].view(tensor.shape).copy_(tensor)
    if layout == "strided":  # unit stride along H, room between the rows
        memory = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 8), float("nan"), dtype=tensor.dtype)
        return memory[..., : tensor.shape[-1]].copy_(tensor)
    assert layout == "transposed", layout  # H is not the innermost dimension
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _dtypes(sample: Sample) -> list[Sample]:
    return [replace(sample, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]


def _gates(*samples: Sample) -> list[Sample]:
    return [replace(sample, hard=hard) for sample in samples for hard in (True, False)]


SAMPLES: list[Sample] = [
    *[sample for gate in _gates(Sample()) for sample in _dtypes(gate)],
    *_gates(
        Sample(batch=1, positions=1, layers=1, hidden=1),
        Sample(layers=1, mask="some"),
        Sample(batch=0),
        Sample(mask="some", temperature=0.3),
        Sample(mask="all"),
        Sample(numbers="tied"),
        Sample(numbers="large", dtype=torch.bfloat16),
        Sample(hidden=37),  # odd: no 16-byte loads
        Sample(hidden=37, dtype=torch.bfloat16, mask="some"),
        Sample(hidden=1036, batch=5),  # past a tile of the CPU's kernels, and of CUDA's decide
        Sample(hidden=1101, batch=2, layers=3, dtype=torch.bfloat16),
        Sample(layers=33, hidden=40, batch=2),  # past a warp
        Sample(layers=131, hidden=16, batch=2),  # past a block of threads
        Sample(layers=43, hidden=24, batch=2, dtype=torch.bfloat16),  # past a round of loads in flight
        Sample(batch=37, layers=5, hidden=20),  # past a round of examples in the weight's gradient
        Sample(layout="unaligned"),
        Sample(layout="unaligned", dtype=torch.bfloat16),
        Sample(layout="strided", mask="some"),
        Sample(layout="transposed", hidden=12),
        Sample(layout="transposed", hidden=12, dtype=torch.bfloat16),
    ),
]
IDS = [sample.name for sample in SAMPLES]
assert len(set(IDS)) == len(IDS)


@dataclass(frozen=True)
class Results:
    """What gated_fuse returned, and the gradients of GRADIENTS."""

    fused: Tensor
    choice: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All of it by name."""
        gradients = {f"gradient of {name}": tensor for name, tensor in self.gradients.items()}
        return {"fused": self.fused, "choice": self.choice, "logits": self.logits, **gradients}


def run(function, inputs: dict, incoming: tuple[Tensor, Tensor]) -> Results:
    """Forward and backward of a function with the signature of gated_fuse."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in GRADIENTS}
    # not the leaf itself: an in-place form may then change it, as it may the output of a layer
    leaf = leaves["ffn_output"]
    memory = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    ffn_output = _Copy.apply(leaf, memory)
    arguments = {**inputs, **leaves, "ffn_output": ffn_output}
    fused, choice, logits = function(**arguments)
    gradients = torch.autograd.grad((fused, logits), list(leaves.values()), incoming)
    return Results(fused.detach(), choice, logits.detach(), dict(zip(leaves, gradients)))


class _Copy(torch.autograd.Function):
    """The first tensor's values in the second one's memory: keeps strides, and is no view."""

    @staticmethod
    def forward(ctx, tensor, memory):
        ctx.mark_dirty(memory)
        return memory.copy_(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def expected(sample: Sample) -> Results:
    """The literal reference in float64, and its autograd."""
    inputs = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in sample.inputs().items()}
    return run(gated_fuse_ref, inputs, tuple(grad.double() for grad in sample.incoming()))


def assert_right(sample: Sample, results: Results, truth: Results | None = None) -> None:
    """Every output and gradient is the truth, rounded once to its dtype."""
    wide = torch.promote_types(sample.dtype, torch.float32)
    for (name, value), right in zip(results.named().items(), (truth or expected(sample)).named().values()):
        assert value.shape == right.shape, name
        assert value.dtype == (wide if name in ("choice", "logits") else sample.dtype), name
        if name == "choice" and sample.hard:
            assert torch.equal(value.double(), right), name
            continue
        largest = right.abs().max().item() if right.numel() else 0.0
        torch.testing.assert_close(
            value.double(),
            right,
            rtol=ROUNDING[value.dtype] * 1.001,
            # subnormal numbers of float16 are multiples of 2^-24
            atol=SUMS[sample.dtype] * max(largest, 1.0) + (2.0**-25 if value.dtype == torch.float16 else 0.0),
            msg=lambda text, name=name: f"{name}: {text}",
        )
