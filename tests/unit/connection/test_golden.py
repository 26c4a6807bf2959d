"""Equal to the authors' code: their figures on tiny models, through the public names."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cc_ds import CCConfig, CCModelForCausalLM

FAMILIES = ["llama", "qwen2", "mistral"]


def _run(folder, english_grad=True, checkpointing=False, noise="noise"):
    model = CCModelForCausalLM.from_pretrained(
        folder, cc_config=CCConfig(english_grad=english_grad), torch_dtype=torch.float32
    ).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    data = load_file(folder / "train_inputs.safetensors")
    gate_noise = data["gumbel_noise"] if noise == "noise" else torch.zeros_like(data["gumbel_noise"])
    output = model(
        data["input_ids"],
        data["attention_mask"],
        labels=data["labels"],
        anchors=data["anchors"],
        english_input_ids=data["en_input_ids"],
        english_attention_mask=data["en_attention_mask"],
        english_anchors=data["en_anchors"],
        gate_noise=gate_noise,
    )
    return model, data, output


def _worst_gradient(model, expected: dict[str, torch.Tensor]) -> float:
    named = dict(model.named_parameters())
    return max(
        (named[name.replace("model.source_select", "decision_maker")].grad - value).abs().max().item()
        for name, value in expected.items()
    )


@pytest.mark.parametrize("noise", ["noise", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward(golden, family, noise):
    _, data, output = _run(golden / family, noise=noise)
    expected = load_file(golden / family / "train_outputs.safetensors")
    real = data["attention_mask"].bool()
    torch.testing.assert_close(output.english_activations, expected["noise.E"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.decision_logits, expected["noise.decision_logits"], atol=1e-4, rtol=0)
    assert torch.equal(output.choice, expected[f"{noise}.one_hot"])
    torch.testing.assert_close(output.logits[real], expected[f"{noise}.logits"][real], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.loss, expected[f"{noise}.loss"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("english_grad", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(golden, family, english_grad, checkpointing):
    model, _, output = _run(golden / family, english_grad, checkpointing)
    output.loss.backward()
    expected = load_file(golden / family / f"grads_{'attached' if english_grad else 'detached'}.safetensors")
    assert len(expected) == len(dict(model.named_parameters()))
    assert _worst_gradient(model, expected) < 2e-5


@pytest.mark.parametrize("english_grad", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_without_noise(golden, family, english_grad):
    model, _, output = _run(golden / family, english_grad, noise="zero")
    output.loss.backward()
    prefix = "attached." if english_grad else "detached."
    stored = load_file(golden / family / "grads_zero_noise_subset.safetensors")
    expected = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    assert expected and _worst_gradient(model, expected) < 2e-5


@pytest.mark.parametrize("prompt", ["p0", "p1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(golden, family, prompt):
    model = CCModelForCausalLM.from_pretrained(golden / family, torch_dtype=torch.float32)
    data = load_file(golden / family / "inference.safetensors")
    model.set_transform(data["W"])
    prompt_ids = data[f"{prompt}.input_ids"]
    model.generation_config.max_length = None
    result = model.generate(
        prompt_ids,
        anchors=data[f"{prompt}.anchor"],
        max_new_tokens=16,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(result.sequences[0, prompt_ids.shape[1] :], data[f"{prompt}.tokens"])
    steps = torch.cat(result.logits)
    torch.testing.assert_close(steps, data[f"{prompt}.step_logits"], atol=1e-4, rtol=0)
    source = model.anchor_activations(prompt_ids, None, data[f"{prompt}.anchor"])
    torch.testing.assert_close(source.detach(), data[f"{prompt}.A"], atol=1e-4, rtol=0)
