"""The fit on two ranks, whole copies and partitioned by ZeRO-3, equals the fit of one process."""

from __future__ import annotations

import json
import random
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .conftest import WORDS, launch, torchrun


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


def test_two_ranks_equal_one(model_folder, pairs_file, tmp_path):
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")

    def arguments(name: str) -> list[str]:
        return [
            "tools/fit_transform.py", "--model", str(model_folder), "--data", str(pairs_file), "--chat_template",
            "plain", "--batch_size", "3", "--output", str(tmp_path / name), "--device", "cpu", "--pairs_per_shard", "7",
        ]  # fmt: skip

    launch([sys.executable, *arguments("one")])
    torchrun(*arguments("two"))
    torchrun(*arguments("sharded"), "--deepspeed", str(config), "--activations", str(tmp_path / "kept"))
    expected = load_file(tmp_path / "one" / "cc_connection.safetensors")["transform"]
    assert expected.abs().max() > 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "one").state_dict()
    for name in ("two", "sharded"):
        found = load_file(tmp_path / name / "cc_connection.safetensors")["transform"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        report = json.loads((tmp_path / name / "transform_report.json").read_text(encoding="utf-8"))
        assert report["fit"]["rows"] == [3 * report["fit"]["pairs"]] and report["held_out"]["pairs"] > 0
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(again[key], base[key]) for key in base)
    assert len(list((tmp_path / "kept").glob("pairs-*.safetensors"))) == 9
