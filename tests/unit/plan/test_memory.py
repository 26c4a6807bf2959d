"""The replayed memory of a step against what torch's profiler sees the CPU's allocator do."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from cc_ds import CCConfig, CCModelForCausalLM
from cc_ds.data.packing import pack, share
from cc_ds.dist.zero import GatherOrders
from cc_ds.models.attention import PACKED
from cc_ds.plan.flops import METHODS, Lengths
from cc_ds.plan.memory import step_memory
from cc_ds.trainer import EnglishPass

ROW = Lengths(english=90, prompt=60, response=70)


def _config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=320, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip


def _row(number: int) -> dict:
    return {
        "input_ids": [5] * ROW.target, "labels": [-100] * ROW.prompt + [5] * ROW.response, "anchor": ROW.prompt - 1,
        "english_input_ids": [number] * ROW.english, "english_anchor": ROW.english - 1, "lang": "und", "source": "",
    }  # fmt: skip


class _Engine:
    """The model as the trainer calls it, without DeepSpeed."""

    optimizer = None

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, **batch):
        return self.model(**batch)

    def backward(self, loss, scale_wrt_gas=False) -> None:
        loss.backward()

    def managed_gradient_accumulation(self) -> bool:
        return False


def _measured(config, method: str, accumulation: int, checkpointing: bool) -> float:
    """Bytes allocated at the peak of a step beyond what was there before it."""
    model = CCModelForCausalLM.from_config(config, cc_config=CCConfig(english_grad=method == "cc")).train()
    model.set_attn_implementation(PACKED)
    if checkpointing:
        model.activation_checkpointing_enable()
    if method == "sft":
        model.decision_maker.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batches = [pack([_row(2 * part), _row(2 * part + 1)], 0, connect=method != "sft") for part in range(accumulation)]
    prompts = None
    if method != "sft":
        prompts, batches = share(batches)
    engine = _Engine(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        english = EnglishPass(engine, GatherOrders(engine), prompts)
        for batch in batches:
            output = engine(packed=batch, english_activations=english.activations, num_items_in_batch=1)
            engine.backward(output.loss)
            del output
        if english.needs_backward:
            english.backward()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("layers", "accumulation"), [(8, 1), (8, 3)])
def test_peak_of_a_step(layers, accumulation, method, checkpointing):
    config = _config(layers)
    measured = _measured(config, method, accumulation, checkpointing)
    planned = step_memory(
        config, method, [ROW] * 2, accumulation, dtype=torch.float32, checkpointing=checkpointing
    ).peak
    assert abs(planned / measured - 1) < 0.15, f"planned {planned}, measured {measured}"
