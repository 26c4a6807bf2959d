"""Memory of a step: its forward and backward replayed on meta tensors, every allocation counted, none made.

What is counted is what autograd keeps and what operations make on the way, of the very code that trains; weights, their
gathered copies, gradients at rest and optimiser states are arithmetic (estimate.py). Attention stands for a fused
kernel: it keeps query, key, value, output and one float32 per head and position.

Memory is affine in the number of layers, so two small depths are replayed and the line is drawn through them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AttentionInterface, PretrainedConfig

from cc_ds.config import CCConfig
from cc_ds.data.packing import Packed, PackedBatch, pack, share
from cc_ds.models.arch import decoder_of
from cc_ds.plan.flops import Lengths
from cc_ds.plan.size import meta_model

DEPTHS = (3, 5)
COUNTED = "cc_ds_counted"


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of activations and temporaries of one rank."""

    english: float
    """English activations of all micro-batches of the step, kept until the English backward; 0 without one."""
    activations: float
    """One micro-batch's target activations: what autograd keeps from the decoder."""
    logits: float
    """Beyond these, the most while logits, loss and their gradients are computed."""
    working: float
    """Beyond english and activations, the most while the layers run forward and backward: one layer's recomputed
    activations under checkpointing, and gradients of weights that are not complete yet."""

    @property
    def peak(self) -> float:
        """The most at a time."""
        return self.english + self.activations + max(self.logits, self.working)


def step_memory(
    config: PretrainedConfig,
    method: str,
    rows: Sequence[Lengths],
    accumulation: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    lora_rank: int = 0,
) -> StepMemory:
    """Memory of one optimiser step over `accumulation` micro-batches of these rows.

    A weight's gradient is gone as soon as it is complete, as under ZeRO-2 and 3.

    Args:
        config: of the model as one rank computes it (see `estimate.local_config`).
        method: sft, cc or cc-nograd.
    """
    depths = [min(depth, config.num_hidden_layers) for depth in DEPTHS]
    if config.num_hidden_layers <= DEPTHS[1]:
        depths = [config.num_hidden_layers] * 2
    replays = []
    for depth in dict.fromkeys(depths):
        model = meta_model(_with_layers(config, depth), CCConfig(english_grad=method == "cc"), dtype, lora_rank)
        model.set_attn_implementation(COUNTED)
        if checkpointing:
            model.activation_checkpointing_enable()
        if method == "sft":
            model.decision_maker.requires_grad_(False)
        replays.append(astuple(_replay(model, method, rows, accumulation)))
    if len(replays) == 1:
        return StepMemory(*replays[0])
    stretch = (config.num_hidden_layers - depths[0]) / (depths[1] - depths[0])
    return StepMemory(*(low + stretch * (high - low) for low, high in zip(*replays, strict=True)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made under it that are still alive, and the most since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in before:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def freed(_):
            self.live -= size
            self.known.pop(key)

        self.known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> int:
        """The peak until now; it counts anew from here."""
        peak, self.peak = self.peak, self.live
        return peak


def _replay(model, method: str, rows: Sequence[Lengths], accumulation: int) -> StepMemory:
    batch, prompts = _batches(rows, method, accumulation)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    marks = {} if method != "sft" else {"english": 0}
    peaks = []

    def decoded(module, arguments, output):
        if "english" not in marks:
            marks["english"] = memory.live
        else:
            marks["activations"] = memory.live - marks["english"]
            output.last_hidden_state.register_hook(gradient_arrives)
        peaks.append(memory.restart())

    def gradient_arrives(gradient):
        marks["logits"] = memory.restart()

    decoder_of(model, model.family).register_forward_hook(decoded)
    with LiveBytes() as memory:
        english_LUH = leaf_LUH = None
        if prompts is not None:
            english_LUH = model(packed_english=prompts).english_activations
            leaf_LUH = english_LUH.detach().requires_grad_(method == "cc")
            marks["english"] = memory.live
        model(packed=batch, english_activations=leaf_LUH, num_items_in_batch=1).loss.backward()
        if prompts is not None and method == "cc":
            (english_LUH * leaf_LUH.grad).sum().backward()
    kept = marks["english"] + marks["activations"]
    return StepMemory(
        english=marks["english"],
        activations=marks["activations"],
        logits=marks["logits"] - kept,
        working=max(memory.peak, *peaks) - kept,
    )


def _batches(rows: Sequence[Lengths], method: str, accumulation: int) -> tuple[PackedBatch, Packed | None]:
    """The first micro-batch, and the English prompts of all, no two of which are the same."""
    connect = method != "sft"
    batches = [
        pack([_tokenised(row, first + number) for number, row in enumerate(rows)], 0, connect)
        for first in range(0, accumulation * len(rows), len(rows))
    ]
    device = torch.device("meta")
    if not connect:
        return batches[0].to(device), None
    english, batches = share(batches)
    return batches[0].to(device), english.to(device)


def _tokenised(row: Lengths, first_token: int) -> dict[str, Any]:
    return {
        "input_ids": [0] * row.target,
        "labels": [-100] * row.prompt + [0] * row.response,
        "anchor": row.prompt - 1,
        "english_input_ids": [first_token] + [0] * (row.english - 1),
        "english_anchor": row.english - 1,
        "lang": "und",
        "source": "plan",
    }


def _with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Counted(torch.autograd.Function):
    """A fused attention kernel's memory without its arithmetic."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _counted_attention(module, query, key, value, attention_mask, *, segment_lengths, **kwargs):
    """`models.attention.packed_attention` segment by segment, as it allocates."""
    lengths = list(segment_lengths)
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_Counted.apply(*part) for part in parts], dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(COUNTED, _counted_attention)
