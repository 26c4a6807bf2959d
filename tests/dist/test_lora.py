"""LoRA under ZeRO equals LoRA in one process; the export is a stock model; a resumed run goes on exactly."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cc_ds.config import ModelConfig
from cc_ds.models.lora import add_lora, merged

from .conftest import launch, read_metrics, train_forked
from .unsharded import Result, Settings, assert_equal, load_model, train_unsharded

pytest.importorskip("peft", reason="LoRA needs peft (pip install 'cc_ds[lora]')")

SETTINGS = Settings(batch_size=8, steps=3)
LORA = {"lora_rank": 4, "lora_alpha": 12.0}
CASES = [  # ZeRO stage, activation checkpointing
    (3, True),
    pytest.param((3, False), marks=pytest.mark.slow),
    pytest.param((0, True), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def command(base_command, tmp_path_factory):
    """A function from a case and an output folder to the training command, for two ranks."""
    configs = tmp_path_factory.mktemp("configs")

    def of(case: tuple[int, bool], folder, *options: str) -> tuple[int, list[str]]:
        stage, checkpointing = case
        config = configs / f"zero{stage}.json"
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        return 2, [
            *base_command, *SETTINGS.options(), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps",
            "2", "--lora_rank", "4", "--lora_alpha", "12", "--deepspeed", str(config), "--gradient_checkpointing",
            str(checkpointing), "--output_dir", str(folder), *options,
        ]  # fmt: skip

    return of


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"zero{case[0]}-checkpointing={case[1]}")
def run(request, command, tmp_path_factory):
    """A run that stops after its first step and is resumed."""
    folder = tmp_path_factory.mktemp("lora")
    run, resume = folder / "run", ("--resume_from_checkpoint", "latest", "--save_steps", "3")
    case = request.param
    train_forked([command(case, run, "--stop_after_steps", "1"), command(case, run, *resume)], folder)
    return run


@pytest.fixture(scope="module")
def truth(model_folder, rows_file, tmp_path_factory):
    """The model after the same steps in one process, its adapters not merged."""
    model = load_model(model_folder, SETTINGS)
    torch.manual_seed(SETTINGS.seed)
    add_lora(model, ModelConfig(model_name_or_path=str(model_folder), **LORA))
    result = train_unsharded(model, model_folder, rows_file, tmp_path_factory.mktemp("cache"), SETTINGS)
    return model, result


def test_losses_and_merged_weights(run, truth):
    model, result = truth
    assert_equal(run, Result(result.losses, result.norms, merged(model.state_dict(), model)))


def test_dropout_stands_before_the_updates_alone(model_folder):
    model = load_model(model_folder, SETTINGS)
    add_lora(model, ModelConfig(model_name_or_path="", lora_rank=2, lora_dropout=0.3, lora_target_modules=("q_proj",)))
    dropouts = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert set(dropouts.values()) == {0.3} and len(dropouts) == 3
    assert all(".q_proj.lora_dropout." in name for name in dropouts)


def test_only_adapters_and_the_decision_maker_are_trained(truth, model_folder, run):
    trained = {name for name, parameter in truth[0].named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in truth[0].named_parameters() if "lora_" in name or "decision_maker" in name}
    assert sum(".lora_A." in name for name in trained) == 3 * 7  # q, k, v, o, gate, up and down of three layers
    before, after = load_file(model_folder / "model.safetensors"), load_file(run / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}


def test_the_export_says_what_the_unmerged_model_says(run, truth):
    ids = torch.tensor([[1, 9, 17, 33, 21, 8]])
    stock = AutoModelForCausalLM.from_pretrained(run).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, truth[0].eval()(ids).logits, atol=1e-4, rtol=0)


def test_a_checkpoint_exports_the_same_stock_model(run, tmp_path):
    checkpoint = ["--checkpoint", str(run / "checkpoint-000003"), "--output", str(tmp_path / "out")]
    launch([sys.executable, "tools/export.py", *checkpoint])
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    assert not list((tmp_path / "out").glob("*lora*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_resumed_run_is_exact(stage, command, tmp_path):
    whole, stopped, dropout = tmp_path / "whole", tmp_path / "stopped", ("--lora_dropout", "0.3")
    options = [(whole, ()), (stopped, ("--stop_after_steps", "1")), (stopped, ("--resume_from_checkpoint", "latest"))]
    train_forked([command((stage, True), folder, *dropout, *extra) for folder, extra in options], tmp_path)
    losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in (whole, stopped)]
    assert losses[0] == losses[1] and len(losses[0]) == SETTINGS.steps
    for file in ("model.safetensors", "cc_connection.safetensors"):
        first, second = load_file(whole / file), load_file(stopped / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
