"""Settings that do not go together, and models that are not there, are refused; what a model brings to a run."""

from __future__ import annotations

import pytest
import tiny_models
import torch

from cc_ds import CCModelForCausalLM, assemble
from cc_ds.assemble import build_data, build_model
from cc_ds.config import load_config
from cc_ds.dist.group import Group


@pytest.mark.parametrize("option", [["--lora_rank", "4"], ["--use_liger_kernel"], ["--transform_share", "0.5"]])
def test_what_tensor_parallelism_does_not_go_with(option, tmp_path):
    tiny_models.hf_config("llama").save_pretrained(tmp_path)  # no weights there
    options = ["--model_name_or_path", str(tmp_path), "--train_file", "rows.jsonl", "--output_dir", str(tmp_path)]
    config = load_config([*options, "--tensor_parallel_size", "2", *option])
    with pytest.raises(ValueError, match=f"{option[0][2:]} does not go with tensor_parallel_size"):
        build_model(config, Group.alone())


@pytest.mark.parametrize("method", ["cc", "sft"])
def test_cc_needs_english(method, tmp_path, monkeypatch):
    asked = {}

    def load_tokenised(files, *_, require_english, **__):
        asked[files] = require_english
        return None, None

    monkeypatch.setattr(assemble, "load_tokenised", load_tokenised)
    monkeypatch.setattr(assemble, "load_template", lambda *_: None)
    monkeypatch.setattr(assemble.export, "load_part", lambda *_, **__: None)
    options = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--method", method]
    build_data(load_config([*options, "--train_file", "a", "--validation_file", "b"]), Group.alone())
    assert asked == {("a",): method == "cc", ("b",): False}


def build(folder, output, *options):
    words = ["--model_name_or_path", str(folder), "--train_file", "rows.jsonl", "--output_dir", str(output), *options]
    return build_model(load_config(words), Group.alone())[0]


@pytest.mark.parametrize("method", ["cc", "sft"])
def test_a_matrix_that_came_with_the_folder_does_not_outlive_the_weights_it_fits(method, tmp_path):
    model = tiny_models.cc_model()
    model.set_transform(torch.randn(tiny_models.HIDDEN, tiny_models.HIDDEN))
    model.save_pretrained(tmp_path)
    assert CCModelForCausalLM.from_pretrained(tmp_path).transform is not None
    assert build(tmp_path, tmp_path, "--method", method).transform is None


def test_plain_sft_leaves_no_matrix(tmp_path):
    tiny_models.cc_model().save_pretrained(tmp_path / "base")
    model = build(tmp_path / "base", tmp_path, "--method", "sft", "--transform_share", "0.5")
    assert model.trained_transform is None
    model.save_pretrained(tmp_path / "tuned")
    assert CCModelForCausalLM.from_pretrained(tmp_path / "tuned").transform is None


def test_a_trained_matrix_starts_from_the_folders(tmp_path):
    matrix = torch.randn(tiny_models.HIDDEN, tiny_models.HIDDEN)
    model = tiny_models.cc_model()
    model.set_transform(matrix)
    model.save_pretrained(tmp_path)
    model = build(tmp_path, tmp_path, "--transform_share", "0.5")
    assert torch.equal(model.trained_transform.weight.T, matrix) and model.transform is None


@pytest.mark.parametrize("step", [build_data, build_model])
def test_a_model_that_is_not_there_is_a_mistake(step, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--model_name_or_path", "nobody/nothing", "--train_file", "rows.jsonl", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"^model_name_or_path nobody/nothing: can't be loaded \(We .*; name a model"):
        step(load_config(options), Group.alone())
    with pytest.raises(ValueError, match=r"^tokenizer_name no/tokenizer: can't be loaded"):
        build_data(load_config([*options, "--tokenizer_name", "no/tokenizer"]), Group.alone())
