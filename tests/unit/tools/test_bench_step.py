"""The bench runs all its arms on the lengths of real rows, and its memory figure is what arithmetic says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cc_ds.config import CCConfig, Config, DataConfig, ModelConfig, TrainConfig
from cc_ds.dist.group import Group

TOOL = Path(__file__).resolve().parents[3] / "tools" / "bench_step.py"
SMALL = ["--hidden", "128", "--layers", "3", "--vocab", "256", "--batch", "2", "--accumulation", "2", "--rounds", "2"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path) -> list[str]:
    """Rows, and a tokenizer under which each word is a token."""
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"instruction": "a " * (20 + n), "output": "b " * (9 + n), "instruction_en": "a " * 12, "lang": "sw"}
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["--data", str(tmp_path / "rows.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]


@pytest.mark.parametrize(
    "precision", [pytest.param([], id="float32"), pytest.param(["--bf16"], id="bf16", marks=pytest.mark.slow)]
)
def test_it_runs_and_says_every_ratio(precision, data, tmp_path):
    command = [sys.executable, str(TOOL), *SMALL, *precision, *data, "--chat_template", "plain"]
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a group of this process, if any
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    output = ["--output", str(tmp_path / "bench.json")]
    done = subprocess.run([*command, *output], env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    for name in ("stock over sft", "cc over sft", "cc-nograd over sft"):
        assert name in done.stdout and result[name]["low"] <= result[name]["median"] <= result[name]["high"]
    assert 1 < result["floor"]["cc-nograd"] < result["floor"]["cc"] < 2
    assert result["peak bytes"]["cc"] > result["peak bytes"]["cc-nograd"] > 0


def test_the_clock_waits_for_a_gpu(bench, monkeypatch):
    synchronize = MagicMock()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    bench.wait(Group(0, 1, torch.device("cpu")))
    assert not synchronize.called
    bench.wait(Group(0, 1, torch.device("cuda", 0)))
    assert synchronize.called


def test_the_stock_model_goes_to_the_device(bench, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", MagicMock())
    model = torch.nn.Linear(2, 2)
    train = TrainConfig(output_dir="none")
    config = Config(
        model=ModelConfig(model_name_or_path="none"), data=DataConfig(train_file=("none",)), cc=CCConfig(), train=train
    )
    bench._stock_arm(model, config, bench.make_rows(bench.parse([])), Group(0, 1, torch.device("meta")))
    assert model.weight.is_meta


def test_data_without_a_tokenizer_is_refused(bench):
    with pytest.raises(ValueError, match="--data needs --tokenizer"):
        bench.make_rows(bench.parse(["--data", "rows.jsonl"]))


def test_peak_bytes_counts_what_is_made_and_forgets_what_is_freed(bench):
    before = torch.ones(1000)  # there already: not counted
    with bench.PeakBytes() as mode:
        kept = before * 2
        for _ in range(5):
            passing = kept + 1
            del passing
        before.add_(1)
        view = kept[10:]
    assert mode.peak == 2 * 4 * 1000 and mode.alive == 4 * 1000
    assert view.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
