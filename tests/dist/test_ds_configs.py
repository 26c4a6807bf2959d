"""Every file of ds_configs/ trains, and to the same weights as plain ZeRO-3.

What a file asks of CUDA alone is left out here: the quantised collectives of ZeRO++. NVMe needs DeepSpeed's async_io
operator, which is built at first use with g++ and the headers of libaio.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from .conftest import REPOSITORY, read_metrics, torchrun

SHIPPED = {path.stem: path for path in sorted((REPOSITORY / "ds_configs").glob("*.json"))}
ON_THE_CPU = {"zero3_plus_plus": {"zero_quantized_weights": False, "zero_quantized_gradients": False}}


def _train(names: list[str], base_command, folder) -> None:
    """Three steps on four ranks with each file, in one launch; one file is the reference."""
    commands = []
    for name in names:
        config = json.loads(SHIPPED[name].read_text(encoding="utf-8"))
        config["zero_optimization"] |= ON_THE_CPU.get(name, {}) | {"stage3_param_persistence_threshold": 0}
        if "zero_hpz_partition_size" in config["zero_optimization"]:
            config["zero_optimization"]["zero_hpz_partition_size"] = 2  # two "nodes" of two ranks
        (folder / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
        tensor_size = 2 if "tensor_parallel" in config else 1
        commands.append([
            *base_command, "--output_dir", str(folder / name), "--max_steps", "3", "--deepspeed",
            str(folder / f"{name}.json"), "--per_device_train_batch_size", str(tensor_size), "--tensor_parallel_size",
            str(tensor_size), "--offload_dir", str(folder / "disk"),
        ])  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(folder / "commands.json"), ranks=4)


def _compare(folder, name: str) -> None:
    first, second = (read_metrics(folder / each) for each in ("zero3", name))
    for ours, theirs in zip(first, second, strict=True):
        torch.testing.assert_close([ours["loss"], ours["grad_norm"]], [theirs["loss"], theirs["grad_norm"]])
    for file in ("model.safetensors", "cc_connection.safetensors"):
        first, second = load_file(folder / "zero3" / file), load_file(folder / name / file)
        torch.testing.assert_close(first, second, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def runs(base_command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ds_configs")
    # Tensor-parallel groups stay for the life of a process: that file comes last.
    names = sorted((name for name in SHIPPED if name != "zero3_nvme"), key=lambda name: "tensor_parallel" in name)
    _train(names, base_command, folder)
    return folder


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in ("zero3", "zero3_nvme")])
def test_trains_as_zero3_does(name, runs):
    _compare(runs, name)


@pytest.mark.slow
def test_nvme_trains_as_zero3_does(base_command, tmp_path):
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's async_io operator can't be built here: install libaio-dev and g++")
    _train(["zero3", "zero3_nvme"], base_command, tmp_path)
    assert list((tmp_path / "disk").rglob("*.swp")), "nothing was offloaded"
    _compare(tmp_path, "zero3_nvme")
