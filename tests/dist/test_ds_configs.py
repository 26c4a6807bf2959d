"""Every file of ds_configs/ trains, and to the same weights as plain ZeRO-3.

What a file asks of CUDA alone is left out here: the quantised weights of ZeRO++. NVMe needs DeepSpeed's async_io
operator, which is built at first use with g++ and the headers of libaio.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from .conftest import REPOSITORY, read_metrics, train_forked

SHIPPED = {path.stem: path for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))}
ON_THE_CPU = {"zero3_plus_plus": {"zero_quantized_weights": False}}


def _train(names: list[str], ranks: int, steps: int, base_command, folder) -> None:
    """Some steps with each file, in one launch."""
    commands = []
    for name in names:
        config = json.loads(SHIPPED[name].read_text(encoding="utf-8"))
        config["zero_optimization"] |= ON_THE_CPU.get(name, {}) | {"stage3_param_persistence_threshold": 0}
        if "zero_hpz_partition_size" in config["zero_optimization"]:
            config["zero_optimization"]["zero_hpz_partition_size"] = 2  # "nodes" of two ranks
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
        tensor_size = 2 if "tensor_parallel" in config else 1
        commands.append([
            *base_command, "--output_dir", str(folder / name), "--max_steps", str(steps), "--deepspeed",
            str(folder / f"{name}.json"), "--per_device_train_batch_size", str(2 * tensor_size),
            "--tensor_parallel_size", str(tensor_size), "--offload_dir", str(folder / "disk"),
        ])  # fmt: skip
    train_forked([(ranks, command) for command in commands], folder)


def _compare(folder, name: str) -> None:
    first, second = (read_metrics(folder / each) for each in ("zero3", name))
    for ours, theirs in zip(first, second, strict=True):
        for key in ("loss", "grad_norm"):
            torch.testing.assert_close(theirs[key], ours[key], atol=1e-5, rtol=1e-4)
    for file in ("model.safetensors", "cc_connection.safetensors"):
        first, second = load_file(folder / "zero3" / file), load_file(folder / name / file)
        torch.testing.assert_close(second, first, atol=2e-5, rtol=0)


def test_one_step_as_zero3(base_command, tmp_path):
    names = ["zero3", "zero3_offload", "zero3_plus_plus"]  # the others are what every test of this folder runs on
    _train(names, 2, 1, base_command, tmp_path)
    for name in names[1:]:
        _compare(tmp_path, name)


@pytest.mark.slow
def test_several_steps_on_four_ranks_as_zero3(base_command, tmp_path):
    names = [name for name in SHIPPED if name != "zero3_nvme"]
    _train(names, 4, 3, base_command, tmp_path)
    for name in names:
        _compare(tmp_path, name)


@pytest.mark.slow
def test_nvme_trains_as_zero3_does(base_command, tmp_path):
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io operator can't be built here: install libaio-dev and g++")
    (tmp_path / "disk").mkdir()
    _train(["zero3", "zero3_nvme"], 2, 3, base_command, tmp_path)
    assert any((tmp_path / "disk").iterdir()), "nothing was offloaded"
    _compare(tmp_path, "zero3_nvme")
