"""Settings that do not go together, and models that are not there, are refused."""

from __future__ import annotations

import pytest
import tiny_models

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


@pytest.mark.parametrize("build", [build_data, build_model])
def test_a_model_that_is_not_there_is_a_mistake(build, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = ["--model_name_or_path", "nobody/nothing", "--train_file", "rows.jsonl", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"^model_name_or_path nobody/nothing: can't be loaded \(We .*; name a model"):
        build(load_config(options), Group.alone())
    with pytest.raises(ValueError, match=r"^tokenizer_name no/tokenizer: can't be loaded"):
        build_data(load_config([*options, "--tokenizer_name", "no/tokenizer"]), Group.alone())
