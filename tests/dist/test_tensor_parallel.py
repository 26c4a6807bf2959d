"""Tensor parallel x ZeRO x data parallel equals one unsharded process: losses, gradients, every parameter.

Tensor parallel 1 x data parallel 2 is test_equal_to_unsharded.py.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from .conftest import read_metrics, train_forked
from .unsharded import Settings, assert_equal, load_model, train_unsharded

ROWS_PER_RANK, ACCUMULATION = 2, 2
# Adam with so large an epsilon is close to plain gradient descent: the weights show the size of every gradient.
GRADIENTS = {"steps": 1, "learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": 0.0}
FEW = [("qwen2", 1, 0, GRADIENTS), ("llama", 2, 3, {"steps": 3})]  # family, data-parallel size, ZeRO stage, settings
REST = {
    "tp2xdp1": [*(("llama", 1, stage, {}) for stage in range(4)), ("qwen2", 1, 3, GRADIENTS)],
    "tp2xdp2": [("llama", 2, stage, {}) for stage in range(3)],
    "gradients": [("qwen2", 2, stage, GRADIENTS) for stage in range(4)],
    "families": [(name, 2, 3, GRADIENTS) for name in ("mistral", "qwen3", "gemma2", "gemma3_text", "gpt_neox")],
    "settings": [("llama", 2, 3, {"method": "sft"}), ("llama", 2, 0, {"english_grad": False})],
}


def _name(case: tuple) -> str:
    family, size, stage, settings = case
    return "-".join([family, f"tp2xdp{size}", f"zero{stage}", *(f"{k}={v}" for k, v in settings.items())])


def _settings(case: tuple) -> Settings:
    return Settings(batch_size=ROWS_PER_RANK * ACCUMULATION * case[1], **case[3])


@pytest.fixture(scope="module")
def family_folder(model_folder, tmp_path_factory):
    """A function from a family to the tiny model's like in it: biases (Qwen2), norms of the heads (Qwen3), ..."""
    shape = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    shape = {name: shape[name] for name in names}
    root = tmp_path_factory.mktemp("families")

    def folder(family: str):
        if family == "llama" or (root / family).exists():
            return model_folder if family == "llama" else root / family
        torch.manual_seed(1)
        odd = {} if family == "gpt_neox" else {"head_dim": 8}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **odd))
        with torch.no_grad():  # biases start at 0 and norms at 1, which hides who adds them how often
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture(scope="module")
def command(base_command, family_folder):
    """A function from a case and a folder to its ranks and training command."""

    def of(case: tuple, folder, *options: str, run: str | None = None) -> tuple[int, list[str]]:
        family, size, stage, _ = case
        config = folder / f"zero{stage}.json"
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        return 2 * size, [
            *base_command, *_settings(case).options(), "--model_name_or_path", str(family_folder(family)),
            "--tokenizer_name", str(family_folder("llama")), "--output_dir", str(folder / (run or _name(case))),
            "--deepspeed", str(config), "--per_device_train_batch_size", str(ROWS_PER_RANK),
            "--gradient_accumulation_steps", str(ACCUMULATION), "--gradient_checkpointing", str(stage == 3),
            "--tensor_parallel_size", "2", *options,
        ]  # fmt: skip

    return of


def _check(cases: list[tuple], folder, family_folder, rows_file) -> None:
    for case in cases:
        settings = _settings(case)
        model = load_model(family_folder(case[0]), settings)
        truth = train_unsharded(model, family_folder("llama"), rows_file, folder / "cache", settings)
        assert_equal(folder / _name(case), truth)


def test_losses_gradients_and_parameters(command, family_folder, rows_file, tmp_path):
    first, *others = FEW
    saves = command(first, tmp_path, "--save_steps", "1")
    train_forked([saves, *(command(case, tmp_path) for case in others)], tmp_path)
    _check(FEW, tmp_path, family_folder, rows_file)
    _assert_ranks_agree(tmp_path / _name(first) / "checkpoint-000001" / "engine")


def _assert_ranks_agree(engine_folder) -> None:
    """What the ranks of a tensor group hold whole is the same bit for bit; of the rest each holds another slice."""
    first, second = (
        torch.load(engine_folder / f"mp_rank_0{rank}_model_states.pt", weights_only=True)["module"] for rank in (0, 1)
    )
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == {name for name in first if "_proj" not in name and "lm_head" not in name}
    assert "decision_maker.weight" in same


@pytest.mark.slow
@pytest.mark.parametrize("cases", REST.values(), ids=REST)
def test_the_other_stages_and_families(cases, command, family_folder, rows_file, tmp_path):
    train_forked([command(case, tmp_path) for case in cases], tmp_path)
    _check(cases, tmp_path, family_folder, rows_file)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_resumed_run_is_exact(stage, command, tmp_path):
    case = ("llama", 2, stage, {})
    stop, resume = ("--stop_after_steps", "3"), ("--resume_from_checkpoint", "latest")
    stopped = [command(case, tmp_path, *options, run="stopped") for options in (stop, resume)]
    train_forked([command(case, tmp_path), *stopped], tmp_path)
    losses = [[line["loss"] for line in read_metrics(tmp_path / run)] for run in (_name(case), "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    for file in ("model.safetensors", "cc_connection.safetensors"):
        first, second = load_file(tmp_path / _name(case) / file), load_file(tmp_path / "stopped" / file)
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
