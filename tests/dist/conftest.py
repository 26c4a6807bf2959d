"""A tiny model, its tokenizer, and parallel rows, some of them without English."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = [f"w{number}" for number in range(60)]


def launch(command: list[str], timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a launcher; a hang ends by a time limit of its own and shows what was said."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "DEEPSPEED_TIMEOUT": "1",  # minutes: a collective that one rank never joins fails in one
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
    }
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, timeout=timeout, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def torchrun(*arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """torchrun on this machine with a free port."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return launch([*run, *arguments])


def train_forked(cases: list[tuple[int, list[str]]], folder: Path, timeout: float = 240) -> None:
    """(ranks, training command), one after another, in processes that share one import; its file goes into `folder`."""
    path = folder / "cases.json"
    path.write_text(json.dumps([{"ranks": ranks, "command": command} for ranks, command in cases]), encoding="utf-8")
    launch([sys.executable, "tests/dist/forked.py", str(path)], timeout)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A Llama of three layers and a word tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\n", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    core.decoder = decoders.WordPiece("")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """24 rows, two thirds of them without English, so that micro-batches of one rank have none at all."""
    draw = random.Random(3)

    def sentence(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        {
            "instruction": sentence(3, 9),
            "output": sentence(1, 5),
            "instruction_en": sentence(3, 9) if number % 3 == 0 else None,
            "lang": "sw" if number % 3 == 0 else "en",
        }
        for number in range(24)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def base_settings(model_folder, rows_file, tmp_path_factory) -> dict[str, Any]:
    """What every run of these tests shares."""
    return {
        "model_name_or_path": str(model_folder), "train_file": str(rows_file), "chat_template": "plain",
        "data_cache_dir": str(tmp_path_factory.mktemp("cache")), "learning_rate": 1e-2, "logging_steps": 1,
        "max_length": 32, "max_english_length": 32, "disable_tqdm": True, "warmup_ratio": 0.2,
        "max_grad_norm": 1.0, "weight_decay": 0.1,
    }  # fmt: skip


@pytest.fixture(scope="session")
def base_command(base_settings, tmp_path_factory) -> list[str]:
    """These as a file, which the options of a test follow and win over."""
    return config_option(base_settings, tmp_path_factory.mktemp("base"))


def config_option(settings: dict[str, Any], folder: Path) -> list[str]:
    """--config and a file of these settings in `folder`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(path)]


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
