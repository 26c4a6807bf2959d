"""Two ranks under ZeRO equal one unsharded process without DeepSpeed: losses and every parameter after 5 steps."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer

from cc_ds import CCConfig
from cc_ds.config import Config, DataConfig, ModelConfig, TrainConfig
from cc_ds.data.dealing import RowCost
from cc_ds.data.tokenise import load_tokenised
from cc_ds.dist.group import Group
from cc_ds.feed import StepFeed

from .conftest import torchrun
from .unsharded import Settings, assert_equal, load_model, train_unsharded

ROWS_PER_RANK, ACCUMULATION = 2, 2


def _cases() -> list[dict]:
    three = [
        {"stage": 3, "english_grad": grad, "checkpointing": checkpointing, "method": "cc"}
        for grad, checkpointing in itertools.product([True, False], repeat=2)
    ]
    others = [{"stage": stage, "english_grad": True, "checkpointing": False, "method": "cc"} for stage in (0, 2)]
    dropout = three[0] | {"english_dropout": 0.5}
    budgets = [others[0] | {"stage": stage, "max_tokens": 16} for stage in (0, 2, 3)]
    own = [
        three[0] | {"english_dropout": 0.2, "transform_share": 0.5},
        others[1] | {"english_grad": False, "transform_share": 0.5},
    ]
    # with one micro-batch, no forward stands between its backward and the English one
    single = [others[0] | {"stage": stage, "accumulation": 1} for stage in (0, 1, 2, 3)]
    # the English backward, the last, does not reach the LM head
    offload = [
        others[0] | {"stage": stage, "accumulation": accumulation, "offload": True}
        for stage in (1, 2, 3)
        for accumulation in (1, 2)
    ]
    sft = {"stage": 3, "english_grad": True, "checkpointing": True, "method": "sft"}
    faster = [case | {"connection_learning_rate": 5e-2} for case in (own[0], others[0], others[1])]
    # A micro-batch has 2 to 12 labels here: one rank takes a chunk of 3 and the other 4
    chunked = [three[0] | {"logits_chunk": True, "validation": True}, others[1] | {"logits_chunk": True}]
    return [*three, *others, dropout, *own, *faster, *chunked, *single, *offload, *budgets, sft]


def _settings(case: dict) -> Settings:
    apart = ("stage", "checkpointing", "max_tokens", "accumulation", "offload", "logits_chunk", "validation")
    same = {key: value for key, value in case.items() if key not in apart}
    return Settings(batch_size=ROWS_PER_RANK * 2 * case.get("accumulation", ACCUMULATION), **same)


def _name(case: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


@pytest.fixture(scope="module")
def sharded_runs(base_command, model_folder, rows_file, tmp_path_factory):
    """Every case trained on two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("sharded")
    commands = []
    validation = ["--validation_file", str(rows_file), "--per_device_eval_batch_size", "1"]
    vocabulary = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    for case in _cases():
        offload = {"offload_optimizer": {"device": "cpu"}} if case.get("offload") else {}
        config = folder / f"zero{case['stage']}{'-offload' if offload else ''}.json"
        # No parameter is small enough to stay whole: everything is partitioned.
        zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 0, **offload}
        config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        commands.append([
            *base_command, *_settings(case).options(), "--output_dir", str(folder / _name(case)), "--deepspeed",
            str(config), "--per_device_train_batch_size", str(ROWS_PER_RANK), "--gradient_accumulation_steps",
            str(case.get("accumulation", ACCUMULATION)), "--gradient_checkpointing", str(case["checkpointing"]),
            "--max_tokens_per_micro_batch", str(case.get("max_tokens", 0)),
            *(validation if case.get("validation") else []),
            *(["--logits_chunk", str(3 * vocabulary)] if case.get("logits_chunk") else []),
        ])  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(folder / "commands.json"))
    return folder


@pytest.mark.parametrize("case", _cases(), ids=_name)
def test_losses_and_parameters(case, sharded_runs, model_folder, rows_file, tmp_path):
    settings = _settings(case)
    truth = train_unsharded(load_model(model_folder, settings), model_folder, rows_file, tmp_path, settings)
    assert_equal(sharded_runs / _name(case), truth)


def test_some_ranks_held_no_english_rows(model_folder, rows_file, tmp_path):
    """What the cases above claim to cover: a micro-batch of one rank without English beside one with."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows, _ = load_tokenised(rows_file, tokenizer, "plain", max_length=32, cache_dir=tmp_path)
    train = TrainConfig(
        output_dir="unused", per_device_train_batch_size=ROWS_PER_RANK, gradient_accumulation_steps=ACCUMULATION
    )
    config = Config(
        cc=CCConfig(), model=ModelConfig(model_name_or_path=""), data=DataConfig(train_file=("",)), train=train
    )
    cost = RowCost(1.0, 1.0, 0.0, 0.0)
    feeds = [StepFeed(rows, Group(rank, 2, torch.device("cpu")), config, 0, 3, cost) for rank in range(2)]
    uneven = 0
    for _ in range(5):
        for first, second in zip(*(next(feed).micro_batches for feed in feeds), strict=True):
            uneven += bool(first[0].connected.all()) != bool(second[0].connected.all())
    assert uneven >= 2
