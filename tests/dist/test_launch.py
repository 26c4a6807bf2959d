"""DeepSpeed's own launcher, two ranks, bf16: what a run leaves behind."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from cc_ds import CCModelForCausalLM
from cc_ds.checkpoint import find_checkpoint

from .conftest import launch, read_metrics


@pytest.fixture(scope="module")
def run_folder(base_command, rows_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    config = folder / "zero2.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}), encoding="utf-8")
    deepspeed = Path(sys.executable).with_name("deepspeed")
    launch([
        str(deepspeed), "--num_gpus", "2", "cc_ds/train.py", *base_command, "--deepspeed", str(config), "--bf16",
        "true", "--output_dir", str(folder / "run"), "--max_steps", "6", "--per_device_train_batch_size", "2",
        "--save_steps", "2", "--save_total_limit", "2", "--validation_file", str(rows_file), "--eval_steps", "3",
    ])  # fmt: skip
    return folder / "run"


def test_loads_as_a_stock_model_without_a_warning(run_folder, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(run_folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert model.dtype == torch.bfloat16
    ids = torch.arange(4, 16)[None]
    connected = CCModelForCausalLM.from_pretrained(run_folder)
    assert torch.equal(model(ids).logits, connected(ids).logits)


def test_newest_checkpoints_are_kept(run_folder):
    assert sorted(path.name for path in run_folder.glob("checkpoint-*")) == ["checkpoint-000004", "checkpoint-000006"]


def test_every_scalar_in_tensorboard_and_jsonl(run_folder):
    events = EventAccumulator(str(run_folder / "tensorboard"))
    events.Reload()
    expected = {
        "loss", "grad_norm", "learning_rate", "tokens_per_second", "english_tokens_per_second", "mfu", "memory_gib",
        "gate_entropy", "fusion_ratio", "eval_loss",
    }  # fmt: skip
    assert expected <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["chosen_layers/sw"]
    lines = read_metrics(run_folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    connected_rows = sum(sum(line["chosen_layers"]["sw"]) for line in lines if "chosen_layers" in line)
    assert connected_rows == 8  # one epoch: 24 rows, a third of them with English
    assert all(line["learning_rate"] >= 0 and line["grad_norm"] > 0 for line in lines if "loss" in line)


def test_every_rank_has_a_log(run_folder):
    logs = {path.name: path.read_text(encoding="utf-8") for path in (run_folder / "logs").iterdir()}
    assert set(logs) == {"rank0.log", "rank1.log"}
    assert all("step 6/6" in text for text in logs.values())


def test_a_truncated_checkpoint_is_named(run_folder, base_command, tmp_path):
    folder = tmp_path / "checkpoint-000006"
    shutil.copytree(run_folder / "checkpoint-000006", folder)
    for file in (folder / "engine").glob("*model_states.pt"):
        file.write_bytes(file.read_bytes()[:100])
    command = [sys.executable, "cc_ds/train.py", *base_command, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(AssertionError, match=f"error: {folder}: damaged"):
        launch([*command, "--max_steps", "9", "--resume_from_checkpoint", str(folder)])


def test_a_checkpoint_without_its_state_is_named(run_folder, tmp_path):
    folder = tmp_path / "checkpoint-000006"
    shutil.copytree(run_folder / "checkpoint-000006", folder)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"not a whole checkpoint \(no trainer_state.json\); whole ones in .*000004"):
        find_checkpoint(str(folder), run_folder)
    assert find_checkpoint("latest", run_folder).name == "checkpoint-000006"
    assert find_checkpoint("latest", tmp_path / "elsewhere") is None
