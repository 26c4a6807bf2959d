"""The trainer: one step, top to bottom, and the loop around it.

    micro-batches -> engine forward (English pass, target pass, loss) -> backward ... -> one optimiser step

The loss of a step is the sum over its target tokens, of all micro-batches and ranks, divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from cc_ds.checkpoint import load_checkpoint, save_checkpoint
from cc_ds.config import Config
from cc_ds.connection.decision import gumbel_noise_at, mix
from cc_ds.data.batches import BatchStream, CCCollator
from cc_ds.dist.engine import grad_norm
from cc_ds.dist.group import Group
from cc_ds.telemetry import Telemetry, Window, flops_per_token, log, peak_flops, peak_memory_bytes


class Trainer:
    """Trains an engine on a stream of rows."""

    def __init__(
        self, engine, group: Group, config: Config, train_rows: Dataset, eval_rows: Dataset | None, collator: CCCollator
    ) -> None:
        train = config.train
        self.engine, self.group, self.train_config = engine, group, train
        self.collator, self.eval_rows = collator, eval_rows
        self.step = 0
        self.total_steps = count_steps(config, len(train_rows), group.world_size)
        self.stream = BatchStream(
            train_rows, train.per_device_train_batch_size, group.rank, group.world_size, seed=train.seed
        )
        languages = sorted(set(train_rows["lang"]))
        self.num_layers = engine.module.config.num_hidden_layers
        self.window = Window(group, languages, self.num_layers)
        self.telemetry: Telemetry | None = None
        self.flops_per_token = flops_per_token(engine.module, config.cc.english_grad)

    # ---- one step ----

    def train_step(self) -> None:
        """One optimiser step over `gradient_accumulation_steps` micro-batches."""
        accumulation = self.train_config.gradient_accumulation_steps
        # Dropout is a function of (seed, step, rank), so that a resumed run draws what the other would have drawn.
        torch.manual_seed(mix(self.train_config.seed, self.step, self.group.rank))
        batches = [self._next_batch() for _ in range(accumulation)]
        target_tokens = self.group.sum(sum((batch["labels"][:, 1:] != -100).sum() for batch, _ in batches))
        for batch, langs in batches:
            output = self.engine(**batch, num_items_in_batch=target_tokens)
            # The engine averages gradients over ranks and micro-batches; ours is a sum over both.
            self.engine.backward(output.loss * self.group.world_size, scale_wrt_gas=False)
            self.window.add_batch(output, batch, langs)
            if self.engine.is_gradient_accumulation_boundary() and self._logs_after_this_step():
                self.grad_norm = grad_norm(self.engine)
            self.engine.step()
        self.step += 1
        self.window.steps += 1

    # ---- the loop ----

    def train(self) -> None:
        """Steps until the end, with logs, evaluations and checkpoints at their intervals."""
        config = self.train_config
        self.telemetry = Telemetry(config.output_dir, self.group, self.step)
        self.engine.train()
        last = min(self.total_steps, config.stop_after_steps or self.total_steps)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=config.method,
            unit="step",
            disable=config.disable_tqdm or not self.group.is_main,
        )
        while self.step < last:
            learning_rate = self.engine.get_lr()[0]
            self.train_step()
            bar.update()
            if self._due(config.logging_steps):
                bar.set_postfix(loss=f"{self._log(learning_rate):.3f}")
            if self.step < self.total_steps and config.eval_steps and self._due(config.eval_steps):
                self.log_evaluation()
            if config.save_steps and self._due(config.save_steps):
                self.save()
        bar.close()
        if config.stop_after_steps and self.step < self.total_steps and not self._due(config.save_steps or math.inf):
            self.save()
        if self.step == self.total_steps:
            self.log_evaluation()
        self.telemetry.close()

    def log_evaluation(self) -> None:
        """The loss per target token on the validation rows, noise off; nothing without such rows."""
        if self.eval_rows is None:
            return
        loss = self.evaluate()
        self.telemetry.write(self.step, {"eval_loss": loss})
        log.info("step %d/%d  eval_loss %.4f", self.step, self.total_steps, loss)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss per target token over all validation rows and ranks."""
        self.engine.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.group.device)
        one = torch.ones((), device=self.group.device)
        for rows in self._eval_batches():
            batch, _ = self._to_device(rows)
            loss = self.engine(**batch, num_items_in_batch=one).loss
            total += torch.stack([loss.double(), (batch["labels"][:, 1:] != -100).sum().double()])
        self.engine.train()
        loss, tokens = self.group.sum(total).tolist()
        return loss / max(tokens, 1)

    def save(self) -> None:
        """A checkpoint at this step."""
        state = {"step": self.step, "data": self.stream.state_dict(), "seed": self.train_config.seed}
        path = save_checkpoint(
            self.engine, self.group, self.train_config.output_dir, state, self.train_config.save_total_limit
        )
        log.info("step %d/%d  saved %s", self.step, self.total_steps, path)

    def resume(self, path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: a damaged checkpoint, or one of a run with another seed, whose rows would be in another order.
        """
        state = load_checkpoint(self.engine, path)
        if state["seed"] != self.train_config.seed:
            raise ValueError(f"{path} was written with seed {state['seed']}, this run has {self.train_config.seed}")
        self.step = state["step"]
        self.stream.load_state_dict(state["data"])
        log.info("resumed from %s at step %d/%d", path, self.step, self.total_steps)

    # ---- small parts ----

    def _due(self, interval: float) -> bool:
        return self.step % interval == 0 or (self.step == self.total_steps and interval != math.inf)

    def _logs_after_this_step(self) -> bool:
        return (self.step + 1) % self.train_config.logging_steps == 0 or self.step + 1 == self.total_steps

    def _next_batch(self) -> tuple[dict[str, Tensor], list[str]]:
        """This rank's next micro-batch on the device, with the gate's noise, and its rows' languages."""
        positions = self.stream.next_positions()
        batch, langs = self._to_device(next(self.stream))
        if self.train_config.method == "cc":
            noise = gumbel_noise_at(positions, self.num_layers, self.train_config.seed)
            batch["gate_noise"] = noise.to(self.group.device, non_blocking=True)
        return batch, langs

    def _to_device(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Tensor], list[str]]:
        batch = self.collator(rows)
        tensors = {
            name: value.to(self.group.device, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        return tensors, batch["langs"]

    def _eval_batches(self) -> Iterator[list[dict[str, Any]]]:
        """This rank's rows. Every rank gives equally many batches; one beyond the end repeats rows without labels."""
        size, ranks = self.train_config.per_device_eval_batch_size, self.group.world_size
        for start in range(0, len(self.eval_rows), size * ranks):
            first = start + self.group.rank * size
            rows = [self.eval_rows[i] for i in range(first, min(first + size, len(self.eval_rows)))]
            if not rows:
                rows = [self.eval_rows[0] | {"labels": [-100] * len(self.eval_rows[0]["labels"])}]
            yield rows

    def _log(self, learning_rate: float) -> float:
        values = self.window.read()
        # ZeRO knows its norm after its step; at stage 0 it was read before the step, as the step clears gradients.
        norm = self.engine.get_global_grad_norm()
        values["grad_norm"] = float(self.grad_norm if norm is None else norm)
        values["learning_rate"] = learning_rate
        target_flops, english_flops = self.flops_per_token
        flops = values["tokens_per_second"] * target_flops + values["english_tokens_per_second"] * english_flops
        values["mfu"] = flops / self._peak_flops()
        values["memory_gib"] = peak_memory_bytes(self.group.device) / 2**30
        self.telemetry.write(self.step, values)
        shown = [values[name] for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second")]
        line = "step %d/%d  loss %.4f  grad_norm %.3f  lr %.2e  %.0f tokens/s"
        log.info(line, self.step, self.total_steps, *shown)
        self.window.reset()
        return values["loss"]

    def _peak_flops(self) -> float:
        if not hasattr(self, "_peak"):
            self._peak = peak_flops(self.group.device) * self.group.world_size
        return self._peak


def count_steps(config: Config, rows: int, world_size: int) -> int:
    """Optimiser steps of a run."""
    train = config.train
    if train.max_steps > 0:
        return train.max_steps
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * world_size
    return max(1, math.ceil(rows * train.num_train_epochs / per_step))
