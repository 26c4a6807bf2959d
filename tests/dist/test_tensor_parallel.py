"""Tensor parallel x ZeRO x data parallel equals one unsharded process: losses, gradients, every parameter."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .conftest import torchrun
from .unsharded import Settings, assert_equal, load_model, train_unsharded

# Adam with so large an epsilon is close to plain gradient descent: the weights show the size of every gradient.
GRADIENTS = {"steps": 1, "learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": 0.0}
CASES = {  # by data-parallel size
    1: [{"stage": 0, "family": "llama"}, {"stage": 3, "family": "qwen2", **GRADIENTS}],
    2: [
        *({"stage": stage, "family": "llama"} for stage in (0, 1, 2, 3)),
        *({"stage": stage, "family": "qwen2", **GRADIENTS} for stage in (0, 2)),
        {"stage": 3, "family": "qwen3", "checkpointing": True},
    ],
}
ROWS_PER_RANK, ACCUMULATION = 2, 2


def _name(case: dict) -> str:
    return f"{case['family']}-zero{case['stage']}-steps{case.get('steps', 5)}"


def _settings(case: dict, data_size: int) -> Settings:
    same = {key: value for key, value in case.items() if key not in ("stage", "family", "checkpointing")}
    return Settings(batch_size=ROWS_PER_RANK * ACCUMULATION * data_size, **same)


@pytest.fixture(scope="module")
def family_folders(model_folder, tmp_path_factory):
    """The tiny model in other families: biases (Qwen2), norms of the heads (Qwen3)."""
    folders = {"llama": model_folder}
    for family in ("qwen2", "qwen3"):
        folder = folders[family] = tmp_path_factory.mktemp(family)
        shape = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
        torch.manual_seed(1)
        config = AutoConfig.for_model(family, **{name: shape[name] for name in names}, head_dim=8)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # biases start at 0 and norms at 1, which hides who adds them how often
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module", params=[1, 2], ids=lambda size: f"tp2xdp{size}")
def runs(request, base_command, family_folders, tmp_path_factory):
    """The cases of one launch: two tensor-parallel ranks, times the data-parallel ones."""
    data_size, folder = request.param, tmp_path_factory.mktemp("tensor_parallel")
    commands = []
    for case in CASES[data_size]:
        config = folder / f"zero{case['stage']}.json"
        zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        commands.append([
            *base_command, *_settings(case, data_size).options(), "--model_name_or_path",
            str(family_folders[case["family"]]), "--tokenizer_name", str(family_folders["llama"]), "--output_dir", str(folder / _name(case)), "--deepspeed", str(config),
            "--per_device_train_batch_size", str(ROWS_PER_RANK), "--gradient_accumulation_steps", str(ACCUMULATION),
            "--gradient_checkpointing", str(case.get("checkpointing", False)), "--tensor_parallel_size", "2",
        ])  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(folder / "commands.json"), ranks=2 * data_size)
    return data_size, folder


def test_losses_gradients_and_parameters(runs, family_folders, rows_file, tmp_path):
    data_size, folder = runs
    for case in CASES[data_size]:
        settings = _settings(case, data_size)
        model = load_model(family_folders[case["family"]], settings)
        truth = train_unsharded(model, family_folders["llama"], rows_file, tmp_path, settings)
        assert_equal(folder / _name(case), truth)
