"""The trainer: one step, top to bottom, and the loop around it.

    packed micro-batches -> English pass of them all -> target pass, loss, backward of each -> English backward -> step

What a step reads is feed.py's matter.

The loss of a step is the sum over its target tokens, of all micro-batches and ranks, divided by their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm

from cc_ds.checkpoint import read_state, save_checkpoint
from cc_ds.config import Config
from cc_ds.connection.decision import mix
from cc_ds.data.dealing import RowLengths
from cc_ds.data.packing import Packed, pack
from cc_ds.data.tokenise import rows_digest
from cc_ds.dist.engine import begin_backward, grad_norm
from cc_ds.dist.group import Group
from cc_ds.dist.signals import Request, Requests
from cc_ds.dist.watchdog import Watchdog
from cc_ds.dist.zero import GatherOrders
from cc_ds.feed import StepFeed
from cc_ds.guard import Guard, poison_if_not_finite
from cc_ds.resume import layout_state, load_checkpoint
from cc_ds.run_state import RunState
from cc_ds.telemetry import Telemetry, Window, log, peak_flops, peak_memory_bytes, row_cost


class EnglishPass:
    """The English prompts of a step, read for all its micro-batches at once (METHOD, Training, last paragraph).

    Weights do not change within a step, so one pass gives every micro-batch its E, and one backward takes the gradients
    that they leave on it: one gather of the parameters under ZeRO-3 where there would be one per micro-batch. It is a
    pass of its own for a single micro-batch too: in one graph with the target rows, no layer's gradient would be
    complete before the English backward, and every rank would hold all of them whole until then (70B: 127 GiB).
    """

    def __init__(self, engine, orders: GatherOrders, english: Packed | None) -> None:
        """`english`: the prompts of all micro-batches; None for plain SFT."""
        self.engine, self.orders = engine, orders
        self.activations: Tensor | None = None
        self.needs_backward = False
        if english is not None:
            with orders.of("english forward"):
                self.whole_LUH = engine(packed_english=english).english_activations
            self.needs_backward = self.whole_LUH.requires_grad
            self.activations = self.whole_LUH.detach().requires_grad_(self.needs_backward)

    def backward(self) -> None:
        """Hand the gradient that the micro-batches left on E down through the English pass."""
        # A scalar whose gradient at E is the one that was left there.
        surrogate = (self.whole_LUH * self.activations.grad).sum()
        begin_backward(self.engine, last=True, after_forward=False)
        with self.orders.of("english backward", forward=False):
            self.engine.backward(surrogate, scale_wrt_gas=False)


class Trainer:
    """Trains an engine on a stream of rows."""

    def __init__(
        self,
        engine,
        group: Group,
        config: Config,
        train_rows: Dataset,
        eval_rows: Dataset | None,
        pad_token_id: int,
        run: RunState,
        requests: Requests,
        describe: Callable[[Path], None] | None = None,
    ) -> None:
        """`describe` writes the model's config and tokenizer into a folder, for checkpoints."""
        train = config.train
        self.run, self.requests, self.describe = run, requests, describe
        self.engine, self.group, self.config, self.train_config = engine, group, config, train
        self.gather_orders = GatherOrders(engine)
        self.eval_rows, self.pad_token_id = eval_rows, pad_token_id
        self.step = 0
        self.request = Request.NONE  # asked for and not yet done
        self.total_steps = count_steps(config, len(train_rows), group.data_size)
        layers = engine.module.config.num_hidden_layers
        cost = row_cost(engine.module, config.cc.english_grad)
        self.rows_digest = rows_digest(train_rows)  # once: the cache's folder may be cleared while it is read
        self.feed = StepFeed(train_rows, group, config, pad_token_id, layers, cost)
        languages = pc.unique(train_rows.with_format("arrow")["lang"]).to_pylist()  # no row becomes a Python object
        self.window = Window(group, sorted(languages), layers)
        self.telemetry: Telemetry | None = None
        self.guard = Guard(group, train)
        self.watchdog = Watchdog(Path(train.output_dir) / "logs" / f"rank{group.rank}.log", train.step_timeout)

    # ---- one step ----

    def train_step(self) -> None:
        """One optimiser step over the feed's next rows."""
        engine, ranks = self.engine, self.group.data_size
        # Dropout is a function of (seed, step, rank), so that a resumed run draws what the other would have drawn; and
        # the ranks of a tensor group drop the same of what they all hold.
        torch.manual_seed(mix(self.train_config.seed, self.step, self.group.data_rank))
        step = next(self.feed)
        target_tokens = self.group.sum(torch.tensor(step.labels, device=self.group.device))  # no host waits for it
        english = EnglishPass(engine, self.gather_orders, step.english)
        losses = []
        for number, (batch, noise) in enumerate(step.micro_batches, start=1):
            last = number == len(step.micro_batches) and not english.needs_backward
            output = engine(
                packed=batch,
                english_activations=english.activations,
                gate_noise=noise,
                num_items_in_batch=target_tokens,
            )
            losses.append(output.loss.detach())
            begin_backward(engine, last)
            # The engine averages gradients over the ranks; ours is a sum over them.
            engine.backward(poison_if_not_finite(output.loss) * ranks, scale_wrt_gas=False)
            self.window.add_batch(output, batch)
        if english.needs_backward:
            english.backward()
        if self._logs_after_this_step():
            self.grad_norm = grad_norm(engine, self.group)
        engine.step()
        self.step += 1
        applied = engine.was_step_applied()
        self.window.add_step(step.english_tokens, applied)
        self.guard.after_step(self.step, applied, losses, step.sources)

    # ---- the loop ----

    def train(self) -> Request:
        """Steps until the end, with logs, evaluations and checkpoints at their intervals.

        Returns:
            What ended it before its end, after a checkpoint (cc_ds/dist/signals.py); NONE: nothing.
        """
        config = self.train_config
        self.telemetry = Telemetry(config.output_dir, self.group, self.step)
        self.window.reset()  # its clock has run since before the checkpoint was loaded
        self.engine.train()
        self.watchdog.start()
        last = min(self.total_steps, config.stop_after_steps or self.total_steps)
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=config.method,
            unit="step",
            disable=config.disable_tqdm or not self.group.is_main,
        )
        while self.step < last and self.request < Request.PREEMPT:
            learning_rate = self.engine.get_lr()[0]
            self.train_step()
            self.watchdog.beat(self.step)
            self._poll()
            bar.update()
            if self._due(config.logging_steps):
                bar.set_postfix(loss=f"{self._log(learning_rate):.3f}")
            # Before an evaluation, which may take longer than whoever asks for the run's end waits.
            if self._due(config.save_steps or math.inf) or self.request or self.step == last < self.total_steps:
                self.save()
            if self.step < self.total_steps and config.eval_steps and self._due(config.eval_steps):
                self.log_evaluation()
        bar.close()
        if self.step == self.total_steps:
            self.log_evaluation()
        if self.request:  # during an evaluation
            self.save()
        self.telemetry.close()
        self.feed.close()
        self.watchdog.stop()
        return self.request if self.step < self.total_steps else Request.NONE

    def log_evaluation(self) -> None:
        """The loss per target token on the validation rows, noise off; nothing without such rows, or on the way out."""
        if self.eval_rows is None:
            return
        self.engine.eval()
        with self.window.paused():
            loss = self.evaluate()
        self.engine.train()
        if loss is None:
            log.info("step %d/%d  not evaluated: asked to end", self.step, self.total_steps)
            return
        self.telemetry.write(self.step, {"eval_loss": loss})
        log.info("step %d/%d  eval_loss %.4f", self.step, self.total_steps, loss)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """The mean loss per target token over all validation rows and ranks; None: asked to end before it was known."""
        total = torch.zeros(2, dtype=torch.float64, device=self.group.device)
        connect = self.train_config.method == "cc"
        for rows, counts, most_labels in self._eval_batches():
            self.watchdog.beat(self.step)
            self._poll()
            if self.request >= Request.PREEMPT:
                return None
            batch = pack(rows, self.pad_token_id, connect, most_labels).to(self.group.device)
            loss = self.engine(packed=batch, num_items_in_batch=1).loss.double()
            total += counts * torch.stack([loss, loss.new_tensor(len(batch.labels))])
        loss, tokens = self.group.sum(total).tolist()
        return loss / max(tokens, 1)

    def save(self) -> None:
        """A checkpoint at this step, unless it has one."""
        if self.request is Request.SAVE:
            self.request = Request.NONE
        if self.run.step == self.step:
            return
        state = {"step": self.step, "data": self.feed.state_dict(), "seed": self.train_config.seed}
        state |= layout_state(self.engine, self.group, self.config)
        state["rows_digest"] = self.rows_digest
        with self.window.paused():
            path = save_checkpoint(
                self.engine,
                self.group,
                self.run,
                state,
                keep=self.train_config.save_total_limit,
                keep_every=self.train_config.save_keep_every,
                describe=self.describe,
            )
        self.run.step = self.step
        self.watchdog.beat(self.step)
        log.info("step %d/%d  saved %s", self.step, self.total_steps, path)

    def resume(self, path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: a damaged checkpoint; one of a run with another seed, whose rows would be in another order; or
                one from after this run's end.
        """
        state = read_state(path)
        if state["step"] > self.total_steps:
            raise ValueError(
                f"{path} is of step {state['step']}, this run ends at {self.total_steps}: raise --max_steps"
            )
        if state["seed"] != self.train_config.seed:
            raise ValueError(f"{path} was written with seed {state['seed']}, this run has {self.train_config.seed}")
        load_checkpoint(self.engine, self.group, self.run, path)
        self.step = self.run.step = state["step"]
        self.feed.load_state_dict(state["data"])
        digests = {state["rows_digest"], self.rows_digest} - {None}
        if len(digests) > 1:
            changed = "the data, the chat template, the tokenizer or the lengths have changed since"
            log.warning("the rows are as many as in %s, but others: %s", path, changed)
        log.info("resumed from %s at step %d/%d", path, self.step, self.total_steps)

    # ---- small parts ----

    def _due(self, interval: float) -> bool:
        return self.step % interval == 0 or (self.step == self.total_steps and interval != math.inf)

    def _poll(self) -> None:
        """See what is asked; every rank must call it equally often."""
        self.request = max(self.request, self.requests.poll())

    def _logs_after_this_step(self) -> bool:
        return (self.step + 1) % self.train_config.logging_steps == 0 or self.step + 1 == self.total_steps

    def _eval_batches(self) -> Iterator[tuple[list[dict[str, Any]], bool, int]]:
        """This rank's rows, whether they count, and how many labels the fullest rank's have.

        Every rank gives equally many batches, as each runs both passes.
        """
        size, ranks = self.train_config.per_device_eval_batch_size, self.group.data_size
        labels = RowLengths.of(self.eval_rows).labels
        for start in range(0, len(self.eval_rows), size * ranks):
            shares = [
                range(first, min(first + size, len(labels))) for first in range(start, start + size * ranks, size)
            ]
            most = max(int(labels[list(share)].sum()) for share in shares)  # the first rank's share is never empty
            share = shares[self.group.data_rank]
            yield [self.eval_rows[i] for i in share or range(1)], bool(share), max(most, int(labels[0]))

    def _log(self, learning_rate: float) -> float:
        values = self.window.read()
        # ZeRO knows its norm after its step; at stage 0 it was read before the step, as the step clears gradients.
        norm = self.engine.get_global_grad_norm()
        values["grad_norm"] = float(self.grad_norm if norm is None else norm)
        values["learning_rate"] = learning_rate
        values["skipped_steps"] = self.guard.skipped
        cost = self.feed.row_cost
        flops = values["tokens_per_second"] * cost.per_target_token
        flops += values["english_tokens_per_second"] * cost.per_english_token
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


def count_steps(config: Config, rows: int, data_size: int) -> int:
    """Optimiser steps of a run over `data_size` data-parallel ranks."""
    train = config.train
    if train.max_steps > 0:
        return train.max_steps
    return max(1, math.ceil(rows * train.num_train_epochs / train.rows_per_step(data_size)))
