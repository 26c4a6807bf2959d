"""LoRA under ZeRO equals LoRA in one process; the export is a stock model; a resumed run goes on exactly."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cc_ds.config import ModelConfig
from cc_ds.models.lora import add_lora, merged

from .conftest import read_metrics, torchrun
from .unsharded import Result, Settings, assert_equal, load_model, train_unsharded

pytest.importorskip("peft", reason="LoRA needs peft (pip install 'cc_ds[lora]')")

SETTINGS = Settings(batch_size=8)
LORA = {"lora_rank": 4, "lora_alpha": 12.0}
CASES = {
    "zero0": (0, ["--gradient_checkpointing", "true"]),
    "zero3": (3, ["--gradient_checkpointing", "false"]),
    "zero3-checkpointing": (3, ["--gradient_checkpointing", "true"]),
}


@pytest.fixture(scope="module")
def runs(base_command, tmp_path_factory):
    """Every case on two ranks; and under ZeRO-3, with dropout, a run that stops and one that does not."""
    folder = tmp_path_factory.mktemp("lora")
    commands = []
    shared = [
        *base_command, *SETTINGS.options(), "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--lora_rank", "4", "--lora_alpha", "12",
    ]  # fmt: skip
    for name, (stage, options) in CASES.items():
        config = folder / f"zero{stage}.json"
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        commands.append([*shared, *options, "--deepspeed", str(config), "--output_dir", str(folder / name)])
    dropout = [*shared, "--deepspeed", str(folder / "zero3.json"), "--lora_dropout", "0.3"]
    commands += [
        [*dropout, "--output_dir", str(folder / "whole")],
        [*dropout, "--output_dir", str(folder / "stopped"), "--stop_after_steps", "2"],
        [*dropout, "--output_dir", str(folder / "stopped"), "--resume_from_checkpoint", "latest"],
    ]
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(folder / "commands.json"))
    return folder


@pytest.fixture(scope="module")
def truth(model_folder, rows_file, tmp_path_factory):
    """The model after the same steps in one process, its adapters not merged."""
    model = load_model(model_folder, SETTINGS)
    torch.manual_seed(SETTINGS.seed)
    add_lora(model, ModelConfig(model_name_or_path=str(model_folder), **LORA))
    result = train_unsharded(model, model_folder, rows_file, tmp_path_factory.mktemp("cache"), SETTINGS)
    return model, result


@pytest.mark.parametrize("name", CASES)
def test_losses_and_merged_weights(name, runs, truth):
    model, result = truth
    assert_equal(runs / name, Result(result.losses, result.norms, merged(model.state_dict(), model)))


def test_only_adapters_and_the_decision_maker_are_trained(truth, model_folder, runs):
    trained = {name for name, parameter in truth[0].named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in truth[0].named_parameters() if "lora_" in name or "decision_maker" in name}
    assert sum(".lora_A." in name for name in trained) == 3 * 7  # q, k, v, o, gate, up and down of three layers
    before, after = load_file(model_folder / "model.safetensors"), load_file(runs / "zero3" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "_proj" in name}


def test_the_export_says_what_the_unmerged_model_says(runs, truth):
    ids = torch.tensor([[1, 9, 17, 33, 21, 8]])
    stock = AutoModelForCausalLM.from_pretrained(runs / "zero3").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, truth[0].eval()(ids).logits, atol=1e-4, rtol=0)


def test_resumed_run_is_exact(runs):
    whole, stopped = runs / "whole", runs / "stopped"
    losses = [[line["loss"] for line in read_metrics(run) if "loss" in line] for run in (whole, stopped)]
    assert losses[0] == losses[1] and len(losses[0]) == SETTINGS.steps
    for file in ("model.safetensors", "cc_connection.safetensors"):
        first, second = load_file(whole / file), load_file(stopped / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
