"""The figures of a log line, against the same figures by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_models import LAYERS, batch, cc_model, tokenised_rows

from cc_ds.connection.capture import ReadPass, flat_positions
from cc_ds.data.packing import pack
from cc_ds.dist.group import Group
from cc_ds.models.attention import PACKED
from cc_ds.telemetry import Window

ALONE = Group(rank=0, world_size=1, device=torch.device("cpu"))


def test_window_against_sums_by_hand():
    model = cc_model()
    model.set_attn_implementation(PACKED)
    rows = tokenised_rows()
    langs = ["sw", "hi", "hi", "sw", "yo"]
    batch = pack([row | {"lang": lang} for row, lang in zip(rows, langs, strict=True)], 0)
    output = model(packed=batch, num_items_in_batch=1)
    window = Window(ALONE, ["hi", "sw", "yo"], LAYERS)
    window.add_batch(output, batch)
    window.add_step(sum(batch.english.lengths), applied=True)
    values = window.read()

    probabilities = torch.softmax(output.decision_logits, dim=1)
    entropy = -(probabilities * probabilities.log()).sum(dim=1).mean()
    assert abs(values["gate_entropy"] - entropy.item()) < 1e-6
    assert abs(values["fusion_ratio"] - output.fusion_ratio.mean().item()) < 1e-6
    # rows 0, 2 and 3 have English, in sw, hi and sw
    expected = {"hi": output.choice[1].tolist(), "sw": (output.choice[0] + output.choice[2]).tolist()}
    assert values["chosen_layers"] == expected
    assert abs(values["loss"] - output.loss.item()) < 1e-4
    tokens = [sum(len(row[name]) for row in rows) for name in ("english_input_ids", "input_ids")]
    assert abs(values["english_tokens_per_second"] / values["tokens_per_second"] - tokens[0] / tokens[1]) < 1e-9


def test_fusion_ratio_is_what_moves_the_row():
    model = cc_model(dtype=torch.float64)
    data = batch()
    output = model(**data)
    before = ReadPass(flat_positions(data["anchors"], data["input_ids"].shape[1]), LAYERS - 1)
    with model.hooks.during(before):
        model.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
    chosen = output.english_activations[output.choice.argmax(dim=1), torch.arange(3)]
    expected = chosen.norm(dim=1) / before.activations()[0].norm(dim=1)
    torch.testing.assert_close(output.fusion_ratio, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("loss", [8.0, math.nan])
def test_of_a_skipped_step_the_tokens_count_alone(loss):
    model = cc_model()
    model.set_attn_implementation(PACKED)
    batch = pack(tokenised_rows(), 0)
    output = model(packed=batch, num_items_in_batch=1)
    windows = [Window(ALONE, ["sw"], LAYERS) for _ in range(2)]
    for window in windows:
        window.add_batch(output, batch)
        window.add_step(7, applied=True)
    skipped = dataclasses.replace(output, loss=torch.tensor(loss), fusion_ratio=9 * output.fusion_ratio)
    windows[0].add_batch(skipped, batch)
    windows[0].add_step(7, applied=False)
    with_skipped, without = (window.read() for window in windows)
    for name in ("loss", "gate_entropy", "fusion_ratio", "chosen_layers"):
        assert with_skipped[name] == without[name]
    assert windows[0].english_tokens == 14 and windows[0].sums[1] == 2 * windows[1].sums[1]


def test_a_window_without_english_says_nothing_of_the_gate():
    model = cc_model()
    model.set_attn_implementation(PACKED)
    batch = pack(tokenised_rows(), 0, connect=False)
    window = Window(ALONE, ["sw"], LAYERS)
    window.add_batch(model(packed=batch, num_items_in_batch=1), batch)
    window.add_step(0, applied=True)
    assert set(window.read()) == {"loss", "tokens_per_second", "english_tokens_per_second"}
