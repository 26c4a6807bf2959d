"""A step on a cluster against arithmetic by hand, and the tool that prints it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from cc_ds.plan.estimate import Cluster, Workload, cheaper_memory, estimate
from cc_ds.plan.flops import METHODS, Lengths, step_flops
from cc_ds.plan.gpus import Gpu
from cc_ds.plan.size import meta_model, size_of

REPOSITORY = Path(__file__).resolve().parents[3]
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip
GPU = Gpu(memory=1.0, bf16=1e12, hbm=1e11, nvlink=1e10, network=8e9)
CLUSTER = Cluster(nodes=2, gpus_per_node=8, gpu=GPU, efficiency=0.5, link_efficiency=0.5)
WORK = Workload(row=Lengths(english=20, prompt=30, response=10), micro_batch=2, accumulation=4)
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 64,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
SIZE = size_of(meta_model(CONFIG))
GIB = 2**30


def test_zero3_by_hand():
    found = estimate(CONFIG, CLUSTER, WORK, ZERO3, "sft")
    weights = SIZE.numel()
    assert found.memory["parameters"] * GIB == 2 * weights / 16
    assert found.memory["gradients"] * GIB == 2 * weights / 16
    assert found.memory["optimiser"] * GIB == 12 * weights / 16
    # forward and backward of every micro-batch, without the Decision Maker, norms staying where they are
    moved = 2 * 4 * 2 * (weights - 3 * 64)
    assert found.moved["all-gather"] == pytest.approx(moved, rel=0.03)
    assert found.moved["reduce-scatter"] == 2 * 4 * (weights - 3 * 64)
    assert found.flops == 4 * step_flops(SIZE, [WORK.row] * 2)["sft"]
    # a ring of 16 GPUs over a link of half the slower of NVLink and a node's network
    seconds = (found.moved["all-gather"] + found.moved["reduce-scatter"]) * 15 / 16 / 4e9
    assert found.seconds["late"] + found.seconds["overlapped"] == pytest.approx(seconds)
    assert found.seconds["compute"] == found.flops / 5e11
    parts = found.seconds["late"] + max(found.seconds["compute"], found.seconds["overlapped"])
    assert found.seconds["step"] == pytest.approx(parts + found.seconds["optimiser"])
    assert found.tokens_per_second == pytest.approx(40 * 2 * 4 * 16 / found.seconds["step"])
    assert found.mfu == pytest.approx(found.flops / found.seconds["step"] / 1e12)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize(("method", "english"), [("cc", 1), ("cc-nograd", 0)])
def test_stage_2_keeps_weights_whole_and_reduces_gradients(micro_batches, method, english):
    work = replace(WORK, accumulation=micro_batches)
    found = estimate(CONFIG, replace(CLUSTER, nodes=1), work, {"zero_optimization": {"stage": 2}}, method)
    weights = SIZE.numel()
    assert found.memory["parameters"] * GIB == 2 * weights
    assert found.memory["gradients"] * GIB == 2 * weights / 8
    # after each micro-batch's backward, and after the English one, which is one of its own for a single one too
    assert found.moved["all-reduce of gradients"] == 2 * weights * (micro_batches + english)


def test_tensor_parallel_splits_layers():
    whole = estimate(CONFIG, CLUSTER, WORK, ZERO3, "cc")
    split = estimate(CONFIG, CLUSTER, replace(WORK, tensor_parallel=4), ZERO3, "cc")
    assert split.flops == whole.flops / 4
    # two all-reduces a layer forward and two backward, over target and English tokens, each twice its bytes
    assert split.moved["tensor-parallel all-reduce"] == 2 * 64 * 3 * 4 * (40 + 20) * 2 * 4
    assert whole.moved["tensor-parallel all-reduce"] == 0
    with pytest.raises(ValueError, match="does not divide the 8 GPUs"):
        estimate(CONFIG, CLUSTER, replace(WORK, tensor_parallel=3), ZERO3, "cc")
    with pytest.raises(ValueError, match="num_key_value_heads"):
        estimate(CONFIG, CLUSTER, replace(WORK, tensor_parallel=8), ZERO3, "cc")


def test_one_micro_batch_holds_no_more_gradients_than_two():
    one, two = (
        estimate(CONFIG, CLUSTER, replace(WORK, micro_batch=1, accumulation=steps, checkpointing=True), ZERO3, "cc")
        for steps in (1, 2)
    )
    assert one.memory["backward"] <= two.memory["backward"]


def test_changes_that_make_it_fit_come_fastest_first():
    needs = estimate(CONFIG, CLUSTER, WORK, {"zero_optimization": {"stage": 1}}, "cc").memory["peak"]
    small = replace(CLUSTER, gpu=replace(GPU, memory=0.7 * needs))
    changes = cheaper_memory(CONFIG, small, WORK, {"zero_optimization": {"stage": 1}}, "cc")
    speeds = [found.tokens_per_second / (32 if "twice the nodes" in name else 16) for name, found in changes]
    assert len(changes) > 2 and speeds == sorted(speeds, reverse=True)
    assert all(found.fits and found.memory["peak"] < 0.7 * needs for _, found in changes)


def plan_tool():
    spec = importlib.util.spec_from_file_location("plan_tool", REPOSITORY / "tools/plan.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize("file", sorted(REPOSITORY.glob("ds_configs/*.json")), ids=lambda path: path.stem)
def test_the_tool_plans_every_configuration(tmp_path, file, capsys):
    CONFIG.save_pretrained(tmp_path)
    plan_tool().main(["--model", str(tmp_path), "--deepspeed", str(file)])
    printed = capsys.readouterr().out
    assert "whole step" in printed
    assert ("RAM or NVMe of a node" in printed) == (file.stem in ("zero3_nvme", "zero3_offload"))


def test_the_tool_prints_three_columns_and_writes_every_figure(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    tool = plan_tool()
    output = tmp_path / "plan.json"
    tool.main(["--model", str(tmp_path), "--nodes", "2", "--accumulation", "2", "--json", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["SFT", "CC-Tuning", "CC,"] for line in lines)
    written = json.loads(output.read_text())
    assert set(METHODS) < set(written)
    step = next(line for line in lines if line.startswith("  whole step"))
    assert [float(cell) for cell in step.split()[2:]] == [
        round(written[method]["seconds"]["step"], 2) for method in METHODS
    ]
    with pytest.raises(ValueError, match="no config"):
        tool.main(["--model", str(tmp_path / "absent")])
