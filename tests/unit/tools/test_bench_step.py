"""The bench runs, and its floors are the FLOPs that a counter sees."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cc_ds.data.packing import pack

SMALL = ["--hidden", "128", "--layers", "3", "--vocab", "256", "--batch", "2", "--rounds", "2"]


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).resolve().parents[3] / "tools" / "bench_step.py"
    spec = importlib.util.spec_from_file_location("bench_step", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _lengths(tmp_path) -> str:
    path = tmp_path / "lengths.jsonl"
    rows = [{"english": 20 + n, "prompt": 30 + 5 * n, "response": 10 + n} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_it_runs_and_says_every_ratio(bench, tmp_path, capsys):
    threads = torch.get_num_threads()
    bench.main([*SMALL, "--lengths", _lengths(tmp_path), "--output", str(tmp_path / "bench.json")])
    torch.set_num_threads(threads)
    text = capsys.readouterr().out
    result = json.loads((tmp_path / "bench.json").read_text())
    for name in ("stock over sft", "cc over sft", "cc-nograd over sft"):
        assert name in text and result[name]["low"] <= result[name]["median"] <= result[name]["high"]


def test_floors_against_the_counter(bench, tmp_path):
    args = bench.parse([*SMALL, "--lengths", _lengths(tmp_path)])
    batches = bench.make_batches(args)
    floor = bench.floors(args, batches)
    for name in ("sft", "cc", "cc-nograd"):
        arm = bench.Arm(name, args)
        counted = 0.0
        for rows in batches:
            batch = pack(rows, 0, connect=name != "sft")
            with FlopCounterMode(display=False) as counter:
                arm.model(packed=batch, num_items_in_batch=1).loss.backward()
            counted += counter.get_total_flops() / len(batches)
        # The counter does not see SDPA on the CPU; scores forward and backward are 3 times forward's.
        passes = {"sft": (3, 0), "cc": (3, 3), "cc-nograd": (3, 1)}[name]
        scores = sum(
            passes[0] * _scores(len(row["input_ids"]), args) + passes[1] * _scores(len(row["english_input_ids"]), args)
            for rows in batches
            for row in rows
        ) / len(batches)
        assert abs(floor[name] / (counted + scores) - 1) < 0.01


def _scores(length: int, args) -> float:
    """QK^T and AV of a causal triangle, diagonal included, in all layers."""
    pairs = length * (length + 1) / 2
    return args.layers * 2 * (2 * pairs * args.hidden)


def test_a_file_with_too_few_rows_is_named(bench, tmp_path):
    with pytest.raises(ValueError, match=r"lengths.jsonl: 4 rows, fewer than one batch of 9"):
        bench.make_batches(bench.parse([*SMALL, "--batch", "9", "--lengths", _lengths(tmp_path)]))
