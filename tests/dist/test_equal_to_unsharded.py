"""Two ranks under ZeRO equal one unsharded process without DeepSpeed: losses and every parameter after 5 steps."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, get_scheduler

from cc_ds import CCConfig, CCModelForCausalLM
from cc_ds.config import Config, DataConfig, ModelConfig, TrainConfig
from cc_ds.connection.decision import gumbel_noise_at, uniform_at
from cc_ds.data.batches import BatchStream, CCCollator
from cc_ds.data.dealing import RowCost
from cc_ds.data.tokenise import load_tokenised
from cc_ds.dist.group import Group
from cc_ds.feed import StepFeed

from .conftest import read_metrics, torchrun

STEPS, ROWS_PER_RANK, ACCUMULATION, SEED = 5, 2, 2, 42


def _cases() -> list[dict]:
    three = [
        {"stage": 3, "english_grad": grad, "checkpointing": checkpointing, "method": "cc"}
        for grad, checkpointing in itertools.product([True, False], repeat=2)
    ]
    others = [{"stage": stage, "english_grad": True, "checkpointing": False, "method": "cc"} for stage in (0, 2)]
    dropout = three[0] | {"english_dropout": 0.5}
    budgets = [others[0] | {"stage": stage, "max_tokens": 16} for stage in (0, 2, 3)]
    return [*three, *others, dropout, *budgets, {"stage": 3, "english_grad": True, "checkpointing": True, "method": "sft"}]


def _name(case: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


@pytest.fixture(scope="module")
def sharded_runs(base_command, tmp_path_factory):
    """Every case trained on two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("sharded")
    commands = []
    for case in _cases():
        config = folder / f"zero{case['stage']}.json"
        # No parameter is small enough to stay whole: everything is partitioned.
        zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
        commands.append([
            *base_command, "--output_dir", str(folder / _name(case)), "--max_steps", str(STEPS), "--deepspeed",
            str(config), "--per_device_train_batch_size", str(ROWS_PER_RANK), "--gradient_accumulation_steps",
            str(ACCUMULATION), "--english_grad", str(case["english_grad"]), "--gradient_checkpointing",
            str(case["checkpointing"]), "--method", case["method"], "--seed", str(SEED), "--english_dropout",
            str(case.get("english_dropout", 0.0)), "--max_tokens_per_micro_batch", str(case.get("max_tokens", 0)),
        ])  # fmt: skip
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    torchrun("tests/dist/worker.py", str(folder / "commands.json"))
    return folder


def _unsharded(case: dict, model_folder, rows_file, cache) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and weights of a plain PyTorch loop over the same rows in global batches."""
    torch.manual_seed(SEED)  # what `train.main` seeds the new Decision Maker with
    model = CCModelForCausalLM.from_pretrained(
        model_folder, cc_config=CCConfig(english_grad=case["english_grad"]), torch_dtype=torch.float32
    ).train()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows, _ = load_tokenised(rows_file, tokenizer, "plain", max_length=32, cache_dir=cache)
    batch_size = ROWS_PER_RANK * 2 * ACCUMULATION
    stream = BatchStream(rows, batch_size, seed=SEED)
    collate = CCCollator(0, connect=case["method"] == "cc")
    if case["method"] == "sft":
        model.decision_maker.requires_grad_(False)
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=STEPS)
    losses, norms = [], []
    for _ in range(STEPS):
        positions = stream.next_positions()
        noise, draws = gumbel_noise_at(positions, 3, SEED), uniform_at(positions, SEED)
        rows_of_step = [
            row | {"english_input_ids": []} if draw < case.get("english_dropout", 0.0) else row
            for row, draw in zip(next(stream), draws, strict=True)
        ]
        batch = {name: value for name, value in collate(rows_of_step).items() if torch.is_tensor(value)}
        if case["method"] == "cc":
            batch["gate_noise"] = noise
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", _cases(), ids=_name)
def test_losses_and_parameters(case, sharded_runs, model_folder, rows_file, tmp_path):
    losses, norms, parameters = _unsharded(case, model_folder, rows_file, tmp_path)
    folder = sharded_runs / _name(case)
    metrics = [line for line in read_metrics(folder) if "loss" in line]
    torch.testing.assert_close([line["loss"] for line in metrics], losses, atol=1e-5, rtol=0)
    torch.testing.assert_close([line["grad_norm"] for line in metrics], norms, atol=0, rtol=1e-4)
    saved = load_file(folder / "model.safetensors") | load_file(folder / "cc_connection.safetensors")
    assert set(parameters) == set(saved)
    for name, parameter in parameters.items():
        torch.testing.assert_close(saved[name], parameter, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


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
    for _ in range(STEPS):
        for first, second in zip(*(next(feed).micro_batches for feed in feeds), strict=True):
            uneven += bool(first[0].connected.all()) != bool(second[0].connected.all())
    assert uneven >= 2
