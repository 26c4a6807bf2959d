"""Going on with other ranks: rows per step kept or refused, and a universal checkpoint that is whole or made anew."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from cc_ds import checkpoint, resume
from cc_ds.config import load_config
from cc_ds.dist.group import Group
from cc_ds.dist.universal import Layout
from cc_ds.resume import check_trained, keep_rows_per_step, load_checkpoint
from cc_ds.run_state import RunState, StaleRunError

ALONE = Group.alone()


TRAINED = {
    "method": "cc",
    "lora_rank": 0,
    "fuse_layer": 0,
    "fuse_norm": "none",
    "gate": "hard",
    "temperature": 1.0,
    "transform_share": "0",
    "connection_learning_rate": "none",
}


def written_by(folder: Path, ranks: int, rows: int = 16, stage: int = 3) -> Path:
    """A checkpoint that this many ranks wrote."""
    path = folder / "checkpoint-000012"
    (path / "engine").mkdir(parents=True)
    (path / "engine/weights.pt").write_bytes(b"x" * 1000)
    layout = {"data_parallel": ranks, "tensor_parallel": 1, "zero_stage": stage}
    state = {"step": 12, "layout": layout, "rows_per_step": rows, "trained": TRAINED}
    (path / "trainer_state.json").write_text(json.dumps(state))
    checkpoint.write_marker(path, {}, {"step": 12, "generation": 1})
    return path


def config(rows: int, accumulation: int):
    return load_config([
        "--model_name_or_path", "m", "--train_file", "f", "--output_dir", "o", "--per_device_train_batch_size",
        str(rows), "--gradient_accumulation_steps", str(accumulation),
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "batch", "accumulation", "expected"),
    [(4, 2, 2, 2), (2, 2, 2, 4), (8, 2, 2, 1), (1, 4, 1, 4), (4, 4, 1, 1)],
)
def test_the_accumulation_makes_up_for_ranks(tmp_path, ranks, batch, accumulation, expected):
    path = written_by(tmp_path, ranks=4)
    train = keep_rows_per_step(config(batch, accumulation), path, ranks).train
    assert train.gradient_accumulation_steps == expected
    assert train.per_device_train_batch_size * expected * ranks == 16


def test_rows_that_can_not_be_made_up_are_an_error(tmp_path):
    path = written_by(tmp_path, ranks=4)
    with pytest.raises(ValueError, match=r"16 rows a step; 3 ranks of 2 rows .* so that their product is 5.33"):
        keep_rows_per_step(config(2, 2), path, 3)
    with pytest.raises(ValueError, match=r"16 rows a step; 4 ranks .* take 32, .* so that their product is 4$"):
        keep_rows_per_step(config(2, 4), path, 4)
    assert keep_rows_per_step(config(2, 4), None, 4) == config(2, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--method", "sft"], "written with method cc, this run has sft"),
        (["--lora_rank", "4"], "written with lora_rank 0, this run has 4"),
        (["--fuse_layer", "2"], "written with fuse_layer 0, this run has 2"),
        (["--fuse_norm", "match"], "written with fuse_norm none, this run has match"),
        (["--gate", "soft"], "written with gate hard, this run has soft"),
        (["--transform_share", "0.5"], "written with transform_share 0, this run has above 0"),
        (["--connection_learning_rate", "1"], "written with connection_learning_rate none, this run has given"),
    ],
)
def test_other_weights_to_train_are_named_before_anything_is_loaded(change, said, tmp_path):
    path, same = written_by(tmp_path, ranks=4), config(2, 2)
    check_trained(same, path)
    words = ["--model_name_or_path", "m", "--train_file", "f", "--output_dir", "o", *change]
    with pytest.raises(ValueError, match=f"checkpoint-000012 was {said}"):
        check_trained(load_config(words), path)


def test_adapters_of_another_scale_or_place_are_named(tmp_path):
    path = written_by(tmp_path, ranks=4)
    words = ["--model_name_or_path", "m", "--train_file", "f", "--output_dir", "o", "--lora_rank", "4"]
    state = json.loads((path / "trainer_state.json").read_text())
    adapters = {"lora_rank": 4, "lora_alpha": 16.0, "lora_target_modules": ["all-linear"]}
    (path / "trainer_state.json").write_text(json.dumps(state | {"trained": state["trained"] | adapters}))
    check_trained(load_config(words), path)
    with pytest.raises(ValueError, match=r"written with lora_alpha 16\.0, this run has 32\.0"):
        check_trained(load_config([*words, "--lora_alpha", "32"]), path)
    with pytest.raises(
        ValueError, match=r"written with lora_target_modules \['all-linear'\], this run has \['q_proj'\]"
    ):
        check_trained(load_config([*words, "--lora_target_modules", "q_proj"]), path)


class Engine:
    """As much of an engine as loading needs, under ZeRO 3 on one rank."""

    def __init__(self, stage: int = 3) -> None:
        self.stage = stage
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

    def autotp_size(self) -> int:
        return 0

    def zero_optimization_stage(self) -> int:
        return self.stage

    def load_checkpoint(self, folder: str, tag: str):
        return folder, {}


@pytest.fixture
def run(tmp_path) -> RunState:
    return RunState(tmp_path / "out", ALONE)


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """DeepSpeed's converter replaced; what it was asked to convert."""
    made = []

    def convert(source: Path, output: Path) -> None:
        made.append(source)
        (output / "zero").mkdir(parents=True)
        (output / "zero/fp32.pt").write_bytes(b"y" * 500)

    monkeypatch.setattr(resume, "convert", convert)
    monkeypatch.setattr(resume, "load_universal", lambda engine, folder: (folder / "engine/zero/fp32.pt").exists())
    return made


def load(run: RunState, path: Path, stage: int = 3) -> dict:
    return load_checkpoint(Engine(stage), ALONE, run, path)


def test_made_once_whole_and_used_again(run, tmp_path, conversions):
    path = written_by(tmp_path / "elsewhere", ranks=2)
    for _ in range(2):
        assert load(run, path)["step"] == 12
    assert conversions == [path / "engine"]
    made = run.output_dir / "checkpoint-000012.universal"
    assert checkpoint.damage(made) is None and checkpoint.digest_damage(made) is None
    assert not list(run.output_dir.glob("*.partial*")) and checkpoint.list_checkpoints(run.output_dir) == []


def test_the_same_ranks_need_none(run, tmp_path, conversions):
    load(run, written_by(tmp_path, ranks=1))
    load(run, written_by(tmp_path / "whole", ranks=2, stage=0), stage=0)
    assert conversions == []


def flip(made: Path, path: Path) -> None:
    data = made / "engine/zero/fp32.pt"
    data.write_bytes(b"z" + data.read_bytes()[1:])


def truncate(made: Path, path: Path) -> None:
    (made / "engine/zero/fp32.pt").write_bytes(b"y")


def other_source(made: Path, path: Path) -> None:
    marker = json.loads((path / "complete.json").read_text())
    (path / "complete.json").write_text(json.dumps(marker | {"generation": 7}))


@pytest.mark.parametrize("harm", [flip, truncate, other_source])
def test_one_that_is_not_what_it_was_is_made_anew(run, tmp_path, conversions, harm):
    path = written_by(tmp_path, ranks=2)
    load(run, path)
    harm(run.output_dir / "checkpoint-000012.universal", path)
    load(run, path)
    assert len(conversions) == 2
    assert checkpoint.digest_damage(run.output_dir / "checkpoint-000012.universal") is None


def test_a_converter_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    path = written_by(tmp_path, ranks=2)
    # the real converter, on what is no checkpoint of DeepSpeed's
    with pytest.raises(ValueError, match=r"checkpoint-000012 not converted: .*; free space there, choose another"):
        load(run, path)
    assert not list(run.output_dir.glob("checkpoint-*"))


def test_too_little_room_is_known_beforehand(run, tmp_path, conversions, monkeypatch):
    path = written_by(tmp_path, ranks=2)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 0, 1999))
    with pytest.raises(ValueError, match=r"takes up to 2e-06 GB in .*out, where 2e-06 are free: free space there"):
        load(run, path)
    assert conversions == []


def test_a_stale_start_converts_nothing(run, tmp_path, conversions):
    RunState(run.output_dir, ALONE)
    with pytest.raises(StaleRunError):
        load(run, written_by(tmp_path, ranks=2))
    assert conversions == []


def test_another_stage_is_named(run, tmp_path, conversions):
    with pytest.raises(ValueError, match=r"under ZeRO 2, this run uses ZeRO 3: give --deepspeed a configuration of st"):
        load(run, written_by(tmp_path, ranks=2, stage=2))


def test_tensor_parallel_ranks_count_too():
    one = Layout(data_parallel=2, tensor_parallel=1, zero_stage=0)
    assert one.needs_conversion(Layout(data_parallel=2, tensor_parallel=2, zero_stage=0))
    assert not one.needs_conversion(Layout(data_parallel=4, tensor_parallel=1, zero_stage=0))
