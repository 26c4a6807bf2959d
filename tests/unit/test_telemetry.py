"""The figures of a log line, against the same figures by hand."""

from __future__ import annotations

import torch
from tiny_models import LAYERS, batch, cc_model
from torch.utils.flop_counter import FlopCounterMode

from cc_ds.dist.group import Group
from cc_ds.telemetry import Window, flops_per_token

ALONE = Group(rank=0, world_size=1, device=torch.device("cpu"))


def test_window_against_sums_by_hand():
    model = cc_model()
    data = batch()
    data["english_attention_mask"][2] = 0
    data["english_anchors"][2] = 0
    output = model(**data)
    window = Window(ALONE, ["hi", "sw"], LAYERS)
    window.add_batch(output, data, ["sw", "hi", "sw"])
    window.steps = 1
    values = window.read()

    probabilities = torch.softmax(output.decision_logits[:2], dim=1)
    entropy = -(probabilities * probabilities.log()).sum(dim=1).mean()
    assert abs(values["gate_entropy"] - entropy.item()) < 1e-6
    assert abs(values["fusion_ratio"] - output.fusion_ratio[:2].mean().item()) < 1e-6
    assert values["chosen_layers"] == {"hi": output.choice[1].tolist(), "sw": output.choice[0].tolist()}
    assert abs(values["loss"] - output.loss.item()) < 1e-6
    ratio = values["english_tokens_per_second"] / values["tokens_per_second"]
    assert abs(ratio - data["english_attention_mask"].sum().item() / data["attention_mask"].sum().item()) < 1e-9


def test_fusion_ratio_is_what_moves_the_row():
    model = cc_model(dtype=torch.float64)
    data = batch()
    output = model(**data)
    from cc_ds.connection.capture import ReadPass

    before = ReadPass(data["anchors"])
    with model.hooks.during(before):
        model.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
    chosen = output.english_activations[output.choice.argmax(dim=1), torch.arange(3)]
    expected = chosen.norm(dim=1) / before.activations()[0].norm(dim=1)
    torch.testing.assert_close(output.fusion_ratio, expected, atol=1e-10, rtol=0)


def test_a_window_without_english_says_nothing_of_the_gate():
    model = cc_model()
    data = {name: value for name, value in batch().items() if not name.startswith("english")}
    window = Window(ALONE, ["sw"], LAYERS)
    window.add_batch(model(**data), data, ["sw"] * 3)
    window.steps = 1
    assert set(window.read()) == {"loss", "tokens_per_second", "english_tokens_per_second"}


def test_flops_per_token_against_the_counter():
    model = cc_model().train()
    data = batch()
    with FlopCounterMode(display=False) as counter:
        model(**data).loss.backward()
    target, english = flops_per_token(model, english_grad=True)
    expected = target * data["input_ids"].numel() + english * data["english_input_ids"].numel()
    # left out: norms and attention scores (small at these lengths), and the gate
    assert 0.95 < expected / counter.get_total_flops() < 1.1
