"""tools/export.py gives from a checkpoint, without a process group, the model that the run itself exported."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import launch

LAYOUTS = ("2x1", "2x2")
"""Data-parallel x tensor-parallel."""


@pytest.fixture(scope="module")
def runs(base_command, tmp_path_factory):
    """bf16, ZeRO 2 and 3, everything partitioned."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = []
    for stage in (2, 3):
        config = folder / f"zero{stage}.json"
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "auto"}}), encoding="utf-8")
        for layout in LAYOUTS:
            data_size, tensor_size = map(int, layout.split("x"))
            command = [
                *base_command, "--output_dir", str(folder / f"{stage}-{layout}"), "--max_steps", "3",
                "--save_steps", "3", "--bf16", "true", "--deepspeed", str(config), "--per_device_train_batch_size", "2",
                "--tensor_parallel_size", str(tensor_size), "--transform_share", "0.5" if tensor_size == 1 else "0",
            ]  # fmt: skip
            cases.append({"ranks": data_size * tensor_size, "command": command})
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    launch([sys.executable, "tests/dist/forked.py", str(folder / "cases.json")])
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", [2, 3])
def test_as_the_run_itself(runs, stage, layout, tmp_path):
    run, out = runs / f"{stage}-{layout}", tmp_path / "out"
    checkpoint = ["--checkpoint", str(run / "checkpoint-000003"), "--output", str(out)]
    launch([sys.executable, "tools/export.py", *checkpoint, "--max_shard_gb", "0.00001"])
    assert len(list(out.glob("model-*.safetensors"))) > 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        stock = AutoModelForCausalLM.from_pretrained(run)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    exported, expected = model.state_dict(), stock.state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    found, expected = (load_file(folder / "cc_connection.safetensors") for folder in (out, run))
    assert found.keys() == expected.keys() and ("transform" in found) == (layout == "2x1")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(run).get_vocab()
    for name in ("config.json", "generation_config.json", "cc_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((run / name).read_text())
