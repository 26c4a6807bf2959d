"""The fit on two ranks, whole copies and partitioned by ZeRO-3, equals the fit of one process."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cc_ds import CCModelForCausalLM

from .conftest import REPOSITORY, WORDS, torchrun


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    draw = random.Random(5)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 9))),
            "prompt_en": " ".join(draw.choices(WORDS, k=draw.randint(2, 9))),
            "lang": "sw" if number % 2 else "yo",
        }
        for number in range(61)
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tuned_folder(model_folder, tmp_path_factory):
    """The tiny model with a Decision Maker."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(model_folder, folder)
    CCModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return folder


def _arguments(model_folder, pairs_file, output) -> list[str]:
    return [
        "--model", str(model_folder), "--data", str(pairs_file), "--chat_template", "plain", "--batch_size", "3",
        "--output", str(output), "--device", "cpu", "--pairs_per_shard", "7", "--activations", f"{output}-activations",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tuned_folder, pairs_file, tmp_path_factory):
    """The fit of this process."""
    spec = importlib.util.spec_from_file_location("fit_tool", REPOSITORY / "tools" / "fit_transform.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    output = tmp_path_factory.mktemp("alone") / "out"
    tool.main(_arguments(tuned_folder, pairs_file, output))
    return output


@pytest.mark.parametrize("kind", ["partitioned", pytest.param("copies", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(kind, alone, tuned_folder, pairs_file, tmp_path):
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    output = tmp_path / "out"
    (tmp_path / "out-activations").mkdir()  # begun by one process: the model is the same however it is partitioned
    shutil.copy(f"{alone}-activations/plan.safetensors", tmp_path / "out-activations")
    more = ["--deepspeed", str(config)] if kind == "partitioned" else []
    torchrun("tools/fit_transform.py", *_arguments(tuned_folder, pairs_file, output), *more)
    expected, found = (load_file(folder / "cc_connection.safetensors")["transform"] for folder in (alone, output))
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * size)
    report = json.loads((output / "transform_report.json").read_text(encoding="utf-8"))
    assert report["fit"]["rows"] == [3 * report["fit"]["pairs"]] and report["held_out"]["pairs"] > 0
    # 61 pairs in shards of 7, none of them left to one rank alone.
    assert len(list((tmp_path / "out-activations").glob("pairs-*.safetensors"))) == 9
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (alone, output))
    assert all(torch.equal(after[key], before[key]) for key in before)
