"""Connected generation against the two-prefill method, written out in plain steps."""

from __future__ import annotations

import pytest
import torch
from reference.two_pass import connected_logits, ffn_outputs
from tiny_models import HIDDEN, LAYERS, VOCAB, cc_model, stock_twin

from cc_ds.models.arch import FAMILIES, layers_of

PROMPTS = [5, 9, 12, 2]
NEW_TOKENS = 6


def _transform(per_layer: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    shape = (LAYERS, HIDDEN, HIDDEN) if per_layer else (HIDDEN, HIDDEN)
    return torch.randn(shape, dtype=torch.float64, generator=draw) / HIDDEN**0.5


def _prompts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (length,), generator=draw) for length in PROMPTS]


def _left_padded(prompts) -> dict[str, torch.Tensor]:
    length = max(map(len, prompts))
    rows = [torch.cat([torch.zeros(length - len(prompt), dtype=torch.long), prompt]) for prompt in prompts]
    masks = [torch.arange(length) >= length - len(prompt) for prompt in prompts]
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks).long()}


def _two_prefills(model, prompt, anchor, english=None) -> list[int]:
    """Greedy tokens for one prompt: read it whole, read it whole again connected, then decode without any cache."""
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES[model.config.model_type])
    anchors, ids = torch.tensor([anchor]), prompt[None]
    if english is None:
        source = ffn_outputs(twin, layers, ids, torch.ones_like(ids), anchors)
        english = (source.double() @ model.transform).to(model.dtype)
    weight, noise = model.decision_maker.weight.detach(), torch.zeros(1, LAYERS, dtype=model.dtype)
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        # The connection acts at the anchor alone, so reading everything again connected is decoding with a cache.
        logits, _, _ = connected_logits(twin, layers, weight, english, ids, torch.ones_like(ids), anchors, noise)
        tokens.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return tokens


def _generate(model, data, **kwargs):
    result = model.generate(
        **data, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs
    )
    return result[:, data["input_ids"].shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_two_prefills_of_each_prompt(family):
    # Gemma 2's eager attention makes NaN of a padding row in float64 (see tiny_models)
    model = cc_model(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    model.set_transform(_transform())
    prompts = _prompts()
    tokens = _generate(model, _left_padded(prompts))
    expected = [_two_prefills(model, prompt, len(prompt) - 1) for prompt in prompts]
    assert tokens.tolist() == expected
    plain = _generate(model, _left_padded(prompts), connect=False)
    assert not torch.equal(tokens, plain), "the connection must matter for this test to mean something"


def test_anchors_before_the_last_token_and_one_matrix_per_layer():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform(per_layer=True))
    prompts = _prompts()[:3]
    data = _left_padded(prompts)
    back = torch.tensor([0, 3, 5])
    tokens = _generate(model, data, anchors=data["input_ids"].shape[1] - 1 - back)
    expected = [_two_prefills(model, p, len(p) - 1 - b) for p, b in zip(prompts, back.tolist(), strict=True)]
    assert tokens.tolist() == expected


def test_logits_equal_two_prefills_to_float64_precision():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    prompt = _prompts()[2]
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES["llama"])
    anchors, ids = torch.tensor([len(prompt) - 1]), prompt[None]
    english = ffn_outputs(twin, layers, ids, torch.ones_like(ids), anchors) @ model.transform
    logits, _, _ = connected_logits(
        twin, layers, model.decision_maker.weight.detach(), english, ids, torch.ones_like(ids), anchors,
        torch.zeros(1, LAYERS, dtype=torch.float64),
    )  # fmt: skip
    result = model.generate(ids, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(result.logits[0][0].double(), logits[0, -1], atol=1e-5, rtol=0)


def test_real_english_prompts_as_the_upper_bound():
    model = cc_model(dtype=torch.float64)
    prompts, english = _prompts()[:2], _prompts()[2:]
    padded = _left_padded(english)
    tokens = _generate(
        model,
        _left_padded(prompts),
        english_input_ids=padded["input_ids"],
        english_attention_mask=padded["attention_mask"],
    )
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES["llama"])
    for row, (prompt, twin_prompt) in enumerate(zip(prompts, english, strict=True)):
        ids = twin_prompt[None]
        activations = ffn_outputs(twin, layers, ids, torch.ones_like(ids), torch.tensor([len(twin_prompt) - 1]))
        assert tokens[row].tolist() == _two_prefills(model, prompt, len(prompt) - 1, english=activations)


def test_without_a_transform_it_is_the_stock_generate():
    model = cc_model()
    data = _left_padded(_prompts())
    assert torch.equal(_generate(model, data), _generate(stock_twin(model), data))


def test_beams_and_several_sequences():
    model = cc_model(dtype=torch.float64)
    model.set_transform(_transform())
    data = _left_padded(_prompts()[:2])
    beams = model.generate(
        **data, max_new_tokens=4, num_beams=3, num_return_sequences=2, eos_token_id=None, pad_token_id=0
    )
    assert beams.shape == (4, data["input_ids"].shape[1] + 4)
    alone = model.generate(_prompts()[0][None], max_new_tokens=4, num_beams=3, eos_token_id=None, pad_token_id=0)
    assert torch.equal(beams[0, -4:], alone[0, -4:])


def test_generation_leaves_nothing_behind():
    model = cc_model()
    model.set_transform(_transform())
    data = _left_padded(_prompts())
    before = model(**data).logits
    first = _generate(model, data)
    assert torch.equal(model(**data).logits, before)
    assert torch.equal(_generate(model, data), first)
    with pytest.raises(ValueError):
        model.generate(**data, max_new_tokens=-1)
    assert torch.equal(model(**data).logits, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"attention_mask": d["attention_mask"].flip(1)}, "padded on the left"),
        (lambda d: d | {"anchors": torch.tensor([0, 0, 0, 0])}, "none of them padding"),
        (lambda d: d | {"anchors": torch.tensor([99, 11, 11, 11])}, "must be prompt positions in"),
        (lambda d: d | {"anchors": torch.tensor([11])}, r"anchors must have shape \(4,\)"),
    ],
)
def test_bad_input(change, message):
    model = cc_model()
    model.set_transform(_transform())
    with pytest.raises(ValueError, match=message):
        _generate(model, change(_left_padded(_prompts())))
