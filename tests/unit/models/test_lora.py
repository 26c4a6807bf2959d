"""Which layers get adapters, and what is trained beside them."""

from __future__ import annotations

import pytest
import tiny_models

from cc_ds.assemble import build_model
from cc_ds.config import ModelConfig, load_config
from cc_ds.dist.group import Group
from cc_ds.models.lora import add_lora

pytest.importorskip("peft", reason="LoRA needs peft (pip install 'cc_ds[lora]')")


def test_a_layer_that_is_not_linear_is_refused():
    settings = ModelConfig(model_name_or_path="", lora_rank=2, lora_target_modules=("q_proj", "embed_tokens"))
    refused = (
        r"^lora_target_modules q_proj embed_tokens matches model.embed_tokens \(Embedding\); name nn.Linear layers"
    )
    with pytest.raises(ValueError, match=refused):
        add_lora(tiny_models.cc_model(), settings)


@pytest.mark.filterwarnings("ignore:Model has")  # peft says so too
def test_a_head_that_is_tied_is_refused():
    settings = ModelConfig(model_name_or_path="", lora_rank=2, lora_target_modules=("q_proj", "lm_head"))
    model = tiny_models.cc_model()
    add_lora(model, settings)
    tied = tiny_models.cc_model("gemma3_text")
    assert tied.config.tie_word_embeddings
    with pytest.raises(ValueError, match="tied"):
        add_lora(tied, settings)


def test_the_trained_transform_is_trained_beside_the_adapters(tmp_path):
    tiny_models.cc_model().save_pretrained(tmp_path)
    options = ["--model_name_or_path", str(tmp_path), "--train_file", "rows.jsonl", "--output_dir", str(tmp_path)]
    config = load_config([*options, "--lora_rank", "2", "--transform_share", "0.5"])
    model, _ = build_model(config, Group.alone())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"decision_maker.weight", "trained_transform.weight"}
