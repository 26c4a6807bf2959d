"""The truth that every sharded run is compared with: a plain PyTorch loop over global batches, without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, get_scheduler

from cc_ds import CCConfig, CCModelForCausalLM
from cc_ds.connection.decision import gumbel_noise_at, uniform_at
from cc_ds.data.batches import BatchStream, CCCollator
from cc_ds.data.tokenise import load_tokenised

from .conftest import read_metrics


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run and its truth share; names are the command line's, `batch_size` counts the rows of a step."""

    batch_size: int
    steps: int = 5
    method: str = "cc"
    english_grad: bool = True
    english_dropout: float = 0.0
    transform_share: float = 0.0
    learning_rate: float = 1e-2
    connection_learning_rate: float | None = None
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 42

    def options(self) -> list[str]:
        """For the command line, but for what depends on the number of ranks."""
        return [
            "--max_steps", str(self.steps), "--method", self.method, "--english_grad", str(self.english_grad),
            "--english_dropout", str(self.english_dropout), "--transform_share", str(self.transform_share),
            "--learning_rate", str(self.learning_rate), "--connection_learning_rate",
            str(self.connection_learning_rate).lower(),
            "--adam_epsilon", str(self.adam_epsilon), "--max_grad_norm", str(self.max_grad_norm), "--seed",
            str(self.seed),
        ]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Of every step the loss and the gradient norm before clipping; the weights after the last."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, torch.Tensor]


def load_model(folder, settings: Settings) -> CCModelForCausalLM:
    """The model as `train.main` makes it: its new Decision Maker is drawn from the run's seed."""
    torch.manual_seed(settings.seed)
    cc_config = CCConfig(english_grad=settings.english_grad, transform_share=settings.transform_share)
    model = CCModelForCausalLM.from_pretrained(folder, cc_config=cc_config, torch_dtype=torch.float32)
    if settings.method == "sft":
        model.decision_maker.requires_grad_(False)
    return model.train()


def train_unsharded(model, tokenizer_folder, rows_file, cache, settings: Settings) -> Result:
    """`settings.steps` steps of `model` on the rows, one padded global batch each."""
    rows, _ = load_tokenised(
        rows_file, AutoTokenizer.from_pretrained(tokenizer_folder), "plain", max_length=32, cache_dir=cache
    )
    stream = BatchStream(rows, settings.batch_size, seed=settings.seed)
    collate = CCCollator(0, connect=settings.method == "cc")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    connection = [p for name, p in trained.items() if name.startswith(("decision_maker", "trained_transform"))]
    matrices = [p for p in trained.values() if p.dim() > 1 and not any(p is other for other in connection)]
    vectors = [p for p in trained.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    if connection:
        rate = settings.connection_learning_rate or settings.learning_rate
        groups.append({"params": connection, "weight_decay": 0.1, "lr": rate})
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate, eps=settings.adam_epsilon,
    )  # fmt: skip
    warm_up = round(0.2 * settings.steps)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=warm_up, num_training_steps=settings.steps)
    losses, norms = [], []
    for _ in range(settings.steps):
        loss = _loss(model, _next_batch(stream, collate, settings))
        loss.backward()
        limit = settings.max_grad_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    if settings.method == "sft":
        del parameters["decision_maker.weight"]  # not trained, and not saved
    return Result(losses, norms, parameters)


def assert_equal(folder, truth: Result) -> None:
    """A finished run logged the truth's losses and norms, and exported its weights."""
    metrics = [line for line in read_metrics(folder) if "loss" in line]
    torch.testing.assert_close([line["loss"] for line in metrics], truth.losses, atol=1e-5, rtol=0)
    torch.testing.assert_close([line["grad_norm"] for line in metrics], truth.norms, atol=0, rtol=1e-4)
    saved = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if "transform" in saved:
        saved["trained_transform.weight"] = saved.pop("transform").T
    assert set(truth.parameters) == set(saved)
    for name, parameter in truth.parameters.items():
        torch.testing.assert_close(saved[name], parameter, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def _loss(model: CCModelForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    own = batch.pop("own")
    if model.trained_transform is None:
        return model(**batch).loss
    english = {name: batch.pop(f"english_{name}") for name in ("input_ids", "attention_mask", "anchors")}
    has_english = english["attention_mask"].any(dim=1)
    english["attention_mask"][:, 0] = 1  # a row without English reads something, and is not connected
    with torch.set_grad_enabled(model.cc_config.english_grad):
        read_LBH = model.anchor_activations(**english)
    matrix = model.trained_transform.weight.T
    # W is in the graph without such a row too: its gradient is then 0, not None, and Adam takes the step
    taken_LBH = torch.where(own[:, None], read_LBH @ matrix, read_LBH)
    anchors, noise = batch.pop("anchors"), batch.pop("gate_noise")
    model.prefill_pass = model.fuse_pass(taken_LBH, anchors, batch["input_ids"].shape[1], has_english, noise)
    return model(**batch).loss


def _next_batch(stream: BatchStream, collate: CCCollator, settings: Settings) -> dict[str, torch.Tensor]:
    positions = stream.next_positions()
    noise, draws = gumbel_noise_at(positions, 3, settings.seed), uniform_at(positions, settings.seed)
    rows, own = list(next(stream)), [False] * settings.batch_size
    for number, (row, draw) in enumerate(zip(rows, draws, strict=True)):
        if draw < settings.english_dropout:
            rows[number] = row | {"english_input_ids": []}
        elif row["english_input_ids"] and draw < settings.english_dropout + settings.transform_share:
            prompt = row["input_ids"][: row["anchor"] + 1]
            rows[number], own[number] = row | {"english_input_ids": prompt, "english_anchor": row["anchor"]}, True
    batch = {name: value for name, value in collate(rows).items() if torch.is_tensor(value)}
    batch["own"] = torch.tensor(own)
    return batch | {"gate_noise": noise} if settings.method == "cc" else batch
