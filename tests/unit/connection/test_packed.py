"""Packed batches equal padded ones, and no segment sees another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import LAYERS, VOCAB, cc_model, tokenised_rows

from cc_ds.connection import loss as loss_module
from cc_ds.data.batches import CCCollator
from cc_ds.data.packing import pack, share
from cc_ds.models.arch import FAMILIES
from cc_ds.models.attention import PACKED


def _noise(rows: int) -> torch.Tensor:
    return torch.randn(rows, LAYERS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _padded(model, rows, noise):
    batch = {name: value for name, value in CCCollator(0)(rows).items() if torch.is_tensor(value)}
    return model(**batch, gate_noise=noise)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_padded(family, checkpointing, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_CHUNK", 7 * VOCAB)  # several chunks
    rows, noise = tokenised_rows(), _noise(5)
    connected = [0, 2, 3]
    gradients, losses, choices = [], [], []
    for packed in (False, True):
        model = cc_model(family, dtype=torch.float64).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        if packed:
            model.set_attn_implementation(PACKED)
            batch = pack(rows, pad_token_id=0)
            assert batch.connected_rows.tolist() == connected
            output = model(
                packed=batch, gate_noise=noise[connected], num_items_in_batch=torch.tensor(len(batch.labels))
            )
            choices.append(output.choice)
        else:
            output = _padded(model, rows, noise)
            choices.append(output.choice[connected])
        output.loss.backward()
        losses.append(output.loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    tolerance = 2e-6  # the stock loss is float32 whatever the model is
    assert torch.equal(*choices)
    torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_neighbour_moves_nothing(family):
    rows = tokenised_rows()
    model = cc_model(family, dtype=torch.float64)
    model.set_attn_implementation(PACKED)

    def losses(rows):
        batch = pack(rows, pad_token_id=0)
        hidden = {}
        handle = model.get_decoder().register_forward_hook(
            lambda m, a, output: hidden.update(h=output.last_hidden_state)
        )
        output = model(packed=batch, num_items_in_batch=torch.tensor(1.0))
        handle.remove()
        return hidden["h"][0].split(batch.target.lengths), output.english_activations

    before, english_before = losses(rows)
    changed = [dict(row) for row in rows]
    changed[2]["input_ids"] = [3 + (token + 7) % (VOCAB - 3) for token in changed[2]["input_ids"]]
    changed[2]["english_input_ids"] = [3 + (token + 7) % (VOCAB - 3) for token in changed[2]["english_input_ids"]]
    after, english_after = losses(changed)
    # Not bit for bit: a mixture of experts groups its products by how many tokens an expert has in all.
    same = {"atol": 1e-12, "rtol": 1e-12}
    for index in (0, 1, 3, 4):
        torch.testing.assert_close(before[index], after[index], **same)
    torch.testing.assert_close(english_before[:, [0, 2]], english_after[:, [0, 2]], **same)
    assert (before[2] - after[2]).abs().max() > 0.1 and (english_before[:, 1] - english_after[:, 1]).abs().max() > 0.1


def test_english_read_once_for_several_micro_batches():
    """E of both micro-batches from one pass, gradients gathered on E, one English backward: the naive gradient."""
    rows, noise = tokenised_rows(count=8), _noise(8)
    halves = [pack(rows[:4], 0), pack(rows[4:], 0)]
    items = torch.tensor(sum(len(half.labels) for half in halves))
    naive = cc_model(dtype=torch.float64).train()
    once = cc_model(dtype=torch.float64).train()
    for model in (naive, once):
        model.set_attn_implementation(PACKED)
    counts = [len(half.connected_rows) for half in halves]
    noises = noise[: sum(counts)].split(counts)
    for half, part in zip(halves, noises, strict=True):
        naive(packed=half, gate_noise=part, num_items_in_batch=items).loss.backward()

    packed_english, shared = share(halves)
    assert len(packed_english.lengths) == sum(counts)
    english = once(packed_english=packed_english).english_activations
    leaf = english.detach().requires_grad_()
    for half, part in zip(shared, noises, strict=True):
        once(packed=half, english_activations=leaf, gate_noise=part, num_items_in_batch=items).loss.backward()
    english.backward(leaf.grad)
    for name, parameter in naive.named_parameters():
        torch.testing.assert_close(once.get_parameter(name).grad, parameter.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("english_grad", [True, False])
def test_a_row_that_reads_its_own_prompt_goes_through_the_matrix(english_grad):
    """Equal to the padded forward with E~ = S W written out, gradients of W and of all else included."""
    rows, noise = tokenised_rows(), _noise(5)
    prompt = rows[2]["input_ids"][: rows[2]["anchor"] + 1]
    rows[2] |= {"english_input_ids": prompt, "english_anchor": rows[2]["anchor"]}
    connected, own = [0, 2, 3], torch.tensor([False, False, True, False, False])
    models = [cc_model(dtype=torch.float64, transform_share=0.5, english_grad=english_grad).train() for _ in range(2)]
    draw = torch.Generator().manual_seed(3)
    for model in models:
        with torch.no_grad():
            model.trained_transform.weight.copy_(
                torch.randn(model.trained_transform.weight.shape, generator=draw.manual_seed(3))
            )
            for layer in model.model.layers:  # activations large enough to matter
                layer.mlp.down_proj.weight.mul_(20)
    packed, literal = models
    packed.set_attn_implementation(PACKED)
    batch = pack([row | {"own_prompt": bool(is_own)} for row, is_own in zip(rows, own, strict=True)], 0)
    assert batch.own.tolist() == [False, True, False]
    found = packed(packed=batch, gate_noise=noise[connected], num_items_in_batch=torch.tensor(len(batch.labels)))

    tensors = {name: value for name, value in CCCollator(0)(rows).items() if torch.is_tensor(value)}
    english = {name: tensors.pop(f"english_{name}") for name in ("input_ids", "attention_mask", "anchors")}
    has_english = english["attention_mask"].any(dim=1)
    english["attention_mask"][:, 0] = 1
    with torch.set_grad_enabled(english_grad):
        read_LBH = literal.anchor_activations(**english)
    taken_LBH = torch.where(own[None, :, None], read_LBH @ literal.trained_transform.weight.T, read_LBH)
    anchors = tensors.pop("anchors")
    literal.prefill_pass = literal.fuse_pass(taken_LBH, anchors, tensors["input_ids"].shape[1], has_english, noise)
    expected = literal(**tensors)
    torch.testing.assert_close(found.loss.double(), expected.loss.double(), atol=2e-6, rtol=0)
    for output in (found, expected):
        output.loss.backward()
    for name, parameter in literal.named_parameters():
        gradient = packed.get_parameter(name).grad
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-6, rtol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert literal.trained_transform.weight.grad.abs().max() > 1e-3


def test_a_batch_without_english_carries_a_stand_in_that_changes_nothing():
    rows = [row | {"english_input_ids": [], "english_anchor": 0} for row in tokenised_rows()]
    model = cc_model(dtype=torch.float64).train()
    model.set_attn_implementation(PACKED)
    batch, plain = pack(rows, 0), pack(rows, 0, connect=False)
    items = torch.tensor(len(batch.labels))
    assert batch.connected.tolist() == [False] and plain.english is None
    with_stand_in = model(packed=batch, num_items_in_batch=items)
    assert torch.equal(with_stand_in.loss, model(packed=plain, num_items_in_batch=items).loss)
    with_stand_in.loss.backward()
    assert model.decision_maker.weight.grad.abs().max() == 0


def test_an_english_prompt_of_two_rows_is_read_once_and_gets_both_gradients():
    rows, noise = tokenised_rows(), _noise(3)
    rows[2] |= {name: rows[0][name] for name in ("english_input_ids", "english_anchor")}
    gradients = []
    for twice in (False, True):
        model = cc_model(dtype=torch.float64).train()
        model.set_attn_implementation(PACKED)
        batch = pack(rows, 0)
        assert len(batch.english.lengths) == 2 and batch.english_of.tolist() == [0, 0, 1]
        if twice:
            apart = [pack([rows[index]], 0).english for index in (0, 2, 3)]
            english = torch.cat([model(packed_english=each).english_activations for each in apart], dim=1)
            batch = replace(batch, english=None, english_of=slice(0, 3))
        output = model(
            packed=batch,
            english_activations=english if twice else None,
            gate_noise=noise,
            num_items_in_batch=torch.tensor(9),
        )
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        # Hugging Face's RMSNorm is float32 inside: a sum of gradients goes through it with another rounding than each
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-4)
