"""Settings that do not go together, and models that are not there, are refused; what a model brings to a run."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny_models
import torch
from datasets import Dataset, DatasetDict
from transformers import GenerationConfig

from cc_ds import CCModelForCausalLM, assemble
from cc_ds.assemble import (
    RunData,
    build_data,
    build_model,
    complete_generation_config,
    export_model,
    with_stored_connection,
)
from cc_ds.config import CCConfig, load_config
from cc_ds.demo.tiny import train_tokenizer
from cc_ds.dist.group import Group


@pytest.mark.parametrize("option", [["--lora_rank", "4"], ["--use_liger_kernel"], ["--transform_share", "0.5"]])
def test_what_tensor_parallelism_does_not_go_with(option, tmp_path):
    tiny_models.hf_config("llama").save_pretrained(tmp_path)  # no weights there
    options = ["--model_name_or_path", str(tmp_path), "--train_file", "rows.jsonl", "--output_dir", str(tmp_path)]
    config = load_config([*options, "--tensor_parallel_size", "2", *option])
    with pytest.raises(ValueError, match=f"{option[0][2:]} does not go with tensor_parallel_size"):
        build_model(config, Group.alone())


def words(folder, output, *options) -> list[str]:
    return ["--model_name_or_path", str(folder), "--train_file", "rows.jsonl", "--output_dir", str(output), *options]


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
    return build_model(load_config(words(folder, output, *options)), Group.alone())[0]


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


def test_a_model_tuned_further_keeps_the_connection_it_was_trained_with(tmp_path):
    trained = {"fuse_layer": 1, "fuse_norm": "match", "gate": "soft", "temperature": 0.5}
    tiny_models.cc_model(**trained, english_grad=False).save_pretrained(tmp_path)
    given = load_config(words(tmp_path, tmp_path, "--gate", "hard", "--english_dropout", "0.25"))
    config = with_stored_connection(given, Group.alone())
    assert config.cc == CCConfig(**trained | {"gate": "hard"}, english_dropout=0.25)
    assert build_model(config, Group.alone())[0].cc_config == config.cc


@pytest.mark.parametrize("stored", [{"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "temperature": 0.9}])
def test_a_generation_config_that_could_not_be_saved_again_is_mended_before_training(stored, tmp_path):
    model = tiny_models.cc_model()
    model.generation_config = GenerationConfig(**stored)
    data = RunData(MagicMock(pad_token_id=0), MagicMock(stop_token_ids=(2, 3)), None, None)
    complete_generation_config(model, data)
    model.save_pretrained(tmp_path)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert written.do_sample and written.temperature == 0.9 and written.eos_token_id == [2, 3]


@pytest.mark.parametrize("stored", [{"temperature": 0.0}, {"do_sample": False, "temperature": 0.5, "top_k": 1}])
def test_a_greedy_generation_config_stays_greedy(stored, tmp_path):
    model = tiny_models.cc_model()
    model.generation_config = GenerationConfig(**stored)
    complete_generation_config(model, RunData(MagicMock(pad_token_id=0), MagicMock(stop_token_ids=(2,)), None, None))
    model.save_pretrained(tmp_path)
    written = GenerationConfig.from_pretrained(tmp_path)
    assert not written.do_sample and written.temperature is None and written.top_k is None
    model.generate(torch.tensor([[1, 3]]), attention_mask=torch.ones(1, 2), max_new_tokens=2, connect=False)


@pytest.mark.parametrize("method", ["cc", "sft"])
def test_only_a_decision_maker_that_was_trained_is_exported(method, tmp_path):
    tiny_models.cc_model().save_pretrained(tmp_path)
    model = build(tmp_path, tmp_path, "--method", method)
    trainer = SimpleNamespace(engine=SimpleNamespace(module=model), group=Group.alone())
    trainer.train_config = load_config(words(tmp_path, tmp_path, "--method", method)).train
    data = SimpleNamespace(tokenizer=MagicMock(pad_token_id=0), template=MagicMock(stop_token_ids=[2]))
    export_model(trainer, data, tmp_path)  # over what was there
    assert (tmp_path / "cc_connection.safetensors").exists() == (method == "cc")
    assert CCModelForCausalLM.from_pretrained(tmp_path).gate_was_stored == (method == "cc")


@pytest.mark.parametrize("step", [build_data, build_model])
def test_a_model_that_is_not_there_is_a_mistake(step, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--model_name_or_path", "nobody/nothing", "--train_file", "rows.jsonl", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"^model_name_or_path nobody/nothing: can't be loaded \(We .*; name a model"):
        step(load_config(options), Group.alone())
    with pytest.raises(ValueError, match=r"^tokenizer_name no/tokenizer: can't be loaded"):
        build_data(load_config([*options, "--tokenizer_name", "no/tokenizer"]), Group.alone())


def test_validation_is_not_read_from_the_train_split(tmp_path):
    """Where train_file and validation_file name one data set."""
    tiny_models.cc_model().save_pretrained(tmp_path / "model")
    train_tokenizer(["one two three"] * 9, tmp_path / "model", vocab_size=300)
    row = {"instruction": "one", "output": "two"}
    splits = {name: Dataset.from_list([row] * rows) for name, rows in (("train", 3), ("validation", 2), ("test", 1))}
    files = ["--train_file", str(tmp_path / "rows"), "--validation_file", str(tmp_path / "rows")]
    options = ["--output_dir", str(tmp_path), "--data_cache_dir", str(tmp_path / "cache"), *files]
    config = load_config(["--model_name_or_path", str(tmp_path / "model"), "--method", "sft", *options])
    for left, rows in (("validation", 2), ("test", 1), ("train", None)):
        DatasetDict(splits).save_to_disk(tmp_path / "rows")
        if rows is None:
            with pytest.raises(ValueError, match=r"no split 'validation' or 'test'; it has \['train'\]"):
                build_data(config, Group.alone())
        else:
            data = build_data(config, Group.alone())
            assert (len(data.train), len(data.validation)) == (3, rows)
        splits.pop(left)
        shutil.rmtree(tmp_path / "rows")
