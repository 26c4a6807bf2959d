"""DeepSpeed configurations: "auto" is filled in, contradictions are named, and the shipped files are sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from cc_ds.config import TrainConfig
from cc_ds.connection.model import concrete_class
from cc_ds.dist.engine import check_tensor_parallel, engine_config

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "ds_configs").glob("*.json"))


def _train(path=None, **changes) -> TrainConfig:
    return TrainConfig(output_dir="out", deepspeed=None if path is None else str(path), **changes)


def _file(tmp_path, content) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_without_a_file():
    config = engine_config(_train(per_device_train_batch_size=3, max_grad_norm=0.5), hidden_size=16)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 0


def test_clipping_off_is_written_out():
    # unset, DeepSpeed would clip at 1.0
    assert engine_config(_train(max_grad_norm=0.0), hidden_size=16)["gradient_clipping"] == 0.0


def test_bf16_never_runs_at_stage_0():
    assert engine_config(_train(bf16=True), hidden_size=16)["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files(path):
    options = {"gradient_accumulation_steps": 4, "tensor_parallel_size": 2, "offload_dir": "/disk"}
    config = engine_config(_train(path, bf16=True, **options), hidden_size=16)
    assert config["gradient_accumulation_steps"] == 4
    assert config["tensor_parallel"]["autotp_size"] == 2
    assert config["bf16"]["enabled"] is True
    assert '"auto"' not in json.dumps(config)
    assert config["zero_optimization"]["stage"] == int(path.name[4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_clipping": 2.0}, 'gradient_clipping is 2.0, but this run has 1.0; write "auto" there'),
        ({"bf16": {"enabled": True}}, "enabled is True, but this run has False"),
        ({"train_batch_size": 8}, "leave train_batch_size out"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size is 2, but this run has 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "give --offload_dir a folder"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "remove zero_quantized_gradients"),
        ({"optimizer": {"type": "Adam"}}, "remove the 'optimizer' section"),
        ({"fp16": {"enabled": True}}, "remove the 'fp16' section"),
        ("{", "ds.json: not JSON"),
        ("[]", "ds.json: expected a JSON object"),
    ],
)
def test_contradictions(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        engine_config(_train(_file(tmp_path, content)), hidden_size=16)


def test_an_absent_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: can't be read"):
        engine_config(_train(tmp_path / "nowhere.json"), hidden_size=16)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("llama", 4, "tensor_parallel_size 4 does not divide the model's num_key_value_heads, 2"),
        ("mixtral", 2, "can't split a mixtral .*moe_tp_experts, packed_colwise.*partition_config"),
        ("phi3", 2, "can't split a phi3 .*rowwise_split_input"),
    ],
)
def test_models_that_tensor_parallelism_cannot_split(family, size, message):
    hf_config = tiny_models.hf_config(family)
    config = engine_config(_train(tensor_parallel_size=size), hidden_size=16)
    with pytest.raises(ValueError, match=message):
        check_tensor_parallel(concrete_class(hf_config), hf_config, config)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox"])
def test_models_that_it_can(family):
    hf_config = tiny_models.hf_config(family)
    config = engine_config(_train(tensor_parallel_size=2), hidden_size=16)
    check_tensor_parallel(concrete_class(hf_config), hf_config, config)
