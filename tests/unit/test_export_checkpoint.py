"""Exporting a checkpoint: weights joined from any number of ranks, and no more memory than a shard needs."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cc_ds.export import export_checkpoint

SHAPES = {"model.a": (7, 5), "model.b": (3,), "decision_maker.weight": (2, 5), "model.c": (4, 9), "model.d": (1,)}


def zero3_checkpoint(
    folder: Path, weights: dict[str, torch.Tensor], ranks: int, frozen=(), buffers=None, method="cc"
) -> Path:
    """As DeepSpeed lays it out: each parameter cut into equal slices, the last one padded; flat groups of any size."""
    engine = folder / "engine"
    (folder / "model").mkdir(parents=True)
    engine.mkdir()
    (folder / "model/config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    (folder / "model/cc_config.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"trained": {"method": method}}))
    sizes = {name: math.ceil(weight.numel() / ranks) for name, weight in weights.items()}

    def part(name: str, rank: int) -> torch.Tensor:
        padded = torch.full((sizes[name] * ranks,), math.nan)
        padded[: weights[name].numel()] = weights[name].flatten()
        return padded[rank * sizes[name] : (rank + 1) * sizes[name]]

    trained = [name for name in weights if name not in frozen]
    for rank in range(ranks):
        model = {
            "module": dict(buffers or {}),
            "buffer_names": list(buffers or {}),
            "param_shapes": [{name: weights[name].shape for name in trained}],
            "frozen_param_shapes": {name: weights[name].shape for name in frozen} or None,
            "frozen_param_fragments": {name: part(name, rank) for name in frozen} or None,
        }
        torch.save(model, engine / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = torch.cat([part(name, rank) for name in trained])
        groups = [group.clone() for group in flat.split(max(4, len(flat) // 3))]
        optimizer = {"zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": groups}
        torch.save({"optimizer_state_dict": optimizer}, engine / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def some_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
@pytest.mark.parametrize("frozen", [(), ("model.b", "model.c")])
def test_slices_are_joined(tmp_path, ranks, frozen):
    weights = some_weights()
    buffers = {"model.table": torch.arange(6)}
    checkpoint = zero3_checkpoint(tmp_path / "checkpoint-000001", weights, ranks, frozen, buffers)
    export_checkpoint(checkpoint, tmp_path / "out", max_shard_bytes=80)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 1
    loaded = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    decision_maker = load_file(tmp_path / "out/cc_connection.safetensors")["decision_maker.weight"]
    assert torch.equal(decision_maker, weights.pop("decision_maker.weight").bfloat16())
    assert torch.equal(loaded.pop("model.table"), buffers["model.table"])
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name].bfloat16()) for name in weights)


def test_plain_sft_leaves_no_decision_maker(tmp_path):
    checkpoint = zero3_checkpoint(tmp_path / "in", some_weights(), 2, ("decision_maker.weight",), method="sft")
    (tmp_path / "out").mkdir()
    export_checkpoint(checkpoint, tmp_path / "out", 10**9)
    assert set(load_file(tmp_path / "out/model.safetensors")) == SHAPES.keys() - {"decision_maker.weight"}
    assert not (tmp_path / "out/cc_connection.safetensors").exists()


def test_tied_weights_are_written_once(tmp_path):
    (tmp_path / "in/engine").mkdir(parents=True)
    zero3_checkpoint(tmp_path / "other", some_weights(), 1)
    for name in ("model", "trainer_state.json"):
        (tmp_path / "other" / name).rename(tmp_path / "in" / name)
    table = torch.randn(5, 4)
    module = {"model.embed.weight": table, "lm_head.weight": table, "decision_maker.weight": torch.randn(2, 4)}
    torch.save({"module": module}, tmp_path / "in/engine/mp_rank_00_model_states.pt")
    export_checkpoint(tmp_path / "in", tmp_path / "out", 10**9)
    assert set(load_file(tmp_path / "out/model.safetensors")) == {"model.embed.weight"}


def test_what_is_missing_is_named(tmp_path):
    checkpoint = zero3_checkpoint(tmp_path / "in", some_weights(), 3)
    next((checkpoint / "engine").glob("*rank_1_*optim*")).unlink()
    with pytest.raises(ValueError, match="3 model and 2 optimiser files of 3 ranks"):
        export_checkpoint(checkpoint, tmp_path / "out", 10**9)
    with pytest.raises(ValueError, match=r"no model/config.json there; name a checkpoint-N folder"):
        export_checkpoint(tmp_path, tmp_path / "out", 10**9)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    checkpoint = zero3_checkpoint(tmp_path / "in", some_weights(), 1)
    torch.save({"optimizer_state_dict": Path("x")}, next((checkpoint / "engine").glob("*optim*")))
    with pytest.raises(ValueError, match="can't be read"):
        export_checkpoint(checkpoint, tmp_path / "out", 10**9)


def test_the_tool_does_not_know_a_latest_checkpoint(tmp_path, monkeypatch):
    repository = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("export_tool", repository / "tools/export.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--checkpoint names a checkpoint-N folder"):
        tool.main(["--checkpoint", "latest", "--output", str(tmp_path / "out")])


MEMORY = """
import sys
from pathlib import Path
from cc_ds.export import _anonymous_memory, export_checkpoint
import deepspeed.runtime.fp16.loss_scaler, deepspeed.runtime.zero.config
for checkpoint, mib in (("small", 8), ("large", 8), ("large", 32)):
    before = _anonymous_memory()
    peak = export_checkpoint(Path(sys.argv[1], checkpoint), Path(sys.argv[1], f"out-{checkpoint}-{mib}"), mib << 20)
    print(peak - before)
"""


@pytest.mark.slow
def test_memory_grows_with_the_shard_not_the_model(tmp_path):
    """Eight times the model, the same shards: the same memory. Four times the shard: more."""
    for name, parameters in (("small", 8), ("large", 64)):
        weights = {f"model.{i}": torch.ones(1024, 1024) for i in range(parameters)}
        weights["decision_maker.weight"] = torch.ones(2, 4)
        zero3_checkpoint(tmp_path / name, weights, 2)
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    small, large, large_shards = (int(line) / 2**20 for line in done.stdout.split()[-3:])
    assert large < small + 16  # MiB; the model itself has grown by 112
    assert 8 < large_shards - large < 48
