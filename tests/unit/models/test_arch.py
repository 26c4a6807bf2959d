"""Every family against the literal reference, and what an unknown family is told."""

from __future__ import annotations

import pytest
import torch
from reference.two_pass import connected_logits, ffn_outputs
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, VOCAB, batch, cc_model, stock_twin
from transformers import AutoConfig, AutoModelForImageTextToText, GPT2Config

from cc_ds import CCModelForCausalLM
from cc_ds.models.arch import FAMILIES, layers_of


def test_every_family_is_tested():
    assert set(FAMILIES) == set(CONFIGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_the_literal_reference(family):
    model = cc_model(family, dtype=torch.float64)
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES[family])
    data = batch()
    noise = torch.randn(3, len(layers), dtype=torch.float64)

    output = model(**data, gate_noise=noise)

    english = ffn_outputs(
        twin, layers, data["english_input_ids"], data["english_attention_mask"], data["english_anchors"]
    )
    assert english.abs().min(dim=-1).values.max() > 0
    torch.testing.assert_close(output.english_activations, english, atol=1e-10, rtol=1e-9)
    logits, choice, decision_logits = connected_logits(
        twin, layers, model.decision_maker.weight, english, data["input_ids"], data["attention_mask"], data["anchors"],
        noise,
    )  # fmt: skip
    torch.testing.assert_close(output.decision_logits, decision_logits, atol=1e-10, rtol=1e-9)
    assert torch.equal(output.choice.argmax(dim=1), choice)
    real = data["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], logits[real], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    gradients = []
    for checkpointing in (False, True):
        model = cc_model(family, dtype=torch.float64).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        noise = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        model(**batch(), gate_noise=noise).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-12, rtol=1e-9)


SMALL_TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16,
              "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                "image_size": 28, "patch_size": 14}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_the_text_model_of_a_multimodal_checkpoint_is_loaded(family, tied, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, text_config=SMALL_TEXT, vision_config=SMALL_VISION, tie_word_embeddings=tied)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    model = CCModelForCausalLM.from_pretrained(tmp_path)
    data = batch()
    ids, mask = data["input_ids"], data["attention_mask"]
    torch.testing.assert_close(model(ids, mask).logits, whole(input_ids=ids, attention_mask=mask).logits)
    assert not any("vision" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path / "tuned")
    again = CCModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert again.config.model_type == model.config.model_type in FAMILIES
    assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)


@pytest.mark.parametrize("kind", ["damaged", "multimodal"])
def test_weights_that_the_files_lack_are_not_made_up(kind, tmp_path):
    if kind == "damaged":
        cc_model("llama").save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:  # the text model stands elsewhere than in Gemma 3 and Mistral 3
        text = SMALL_TEXT | {"model_type": "llama", "num_key_value_heads": 2, "pad_token_id": 0}
        config = AutoConfig.for_model("smolvlm", text_config=text, vision_config=SMALL_VISION, image_token_id=2)
        AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of a llama model are not in its files \(.*would be random"):
        CCModelForCausalLM.from_pretrained(tmp_path)


def test_an_unknown_family_is_told_what_to_add():
    with pytest.raises(ValueError, match=r"'gpt2' is not known.*cc_ds/models/arch.py.*Family\("):
        CCModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
