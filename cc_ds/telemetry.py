"""What a run says: a log file per rank, the console and TensorBoard from rank 0, and every scalar as jsonl too.

Sums are kept on the device between log lines (`Window`), so that no step waits for the host.

Shapes: K connected rows, L layers.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from cc_ds.data.dealing import RowCost
from cc_ds.data.packing import PackedBatch
from cc_ds.dist.group import Group
from cc_ds.plan.flops import flops_per_token
from cc_ds.plan.gpus import gpu_named
from cc_ds.plan.size import size_of

if TYPE_CHECKING:
    from cc_ds.connection.model import CCOutput

log = logging.getLogger("cc_ds")


def start_logging(output_dir: str | Path, group: Group) -> None:
    """Every rank logs to output_dir/logs/rankN.log; rank 0 also to the console.

    Raises:
        ValueError: a folder that can't be written.
    """
    folder = Path(output_dir) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank{group.rank}.log", encoding="utf-8")]
    except OSError as error:
        raise ValueError(f"{folder}: can't be written ({error.strerror}); choose another --output_dir") from error
    if group.is_main:
        handlers.append(logging.StreamHandler(sys.stderr))
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class Telemetry:
    """Writes scalars and histograms on rank 0: output_dir/tensorboard and output_dir/metrics.jsonl."""

    def __init__(self, output_dir: str | Path, group: Group, step: int) -> None:
        self.writer: SummaryWriter | None = None
        if group.is_main:
            # purge_step: after a resume, what a lost part of the run wrote beyond this step is hidden.
            self.writer = SummaryWriter(str(Path(output_dir) / "tensorboard"), purge_step=step)
            self.jsonl = open(Path(output_dir) / "metrics.jsonl", "a", encoding="utf-8")

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of jsonl; numbers go to TensorBoard as scalars, `{name: {key: [counts]}}` as histograms."""
        if self.writer is None:
            return
        self.jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self.jsonl.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)
            elif isinstance(value, dict):
                for key, counts in value.items():
                    self._histogram(f"{name}/{key}", counts, step)

    def _histogram(self, name: str, counts: list[float], step: int) -> None:
        layers = torch.arange(len(counts), dtype=torch.float64)
        self.writer.add_histogram_raw(
            name,
            min=0,
            max=len(counts) - 1,
            num=sum(counts),
            sum=float((layers * torch.tensor(counts, dtype=torch.float64)).sum()),
            sum_squares=float((layers**2 * torch.tensor(counts, dtype=torch.float64)).sum()),
            bucket_limits=(layers + 0.5).tolist(),
            bucket_counts=counts,
            global_step=step,
        )

    def close(self) -> None:
        """Flush and close the files."""
        if self.writer is not None:
            self.writer.close()
            self.jsonl.close()


class Window:
    """Sums since the last log line, on the device; one reduction over the ranks when they are read."""

    def __init__(self, group: Group, languages: Sequence[str], num_layers: int) -> None:
        self.group = group
        self.languages = list(languages)
        self.index = {language: position for position, language in enumerate(self.languages)}
        self.sums = torch.zeros(5, dtype=torch.float64, device=group.device)
        self.choices = torch.zeros(len(self.languages), num_layers, dtype=torch.float64, device=group.device)
        self.step_sums, self.step_choices = torch.zeros_like(self.sums), torch.zeros_like(self.choices)
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self.sums.zero_()
        self.choices.zero_()
        self.steps = self.english_tokens = 0
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the block, an evaluation or a checkpoint, takes none of the window's time."""
        self.sums.tolist()  # the device has done the steps before it
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    @torch.no_grad()
    def add_batch(self, output: CCOutput, batch: PackedBatch) -> None:
        """A micro-batch: its share of the step's loss, its tokens, and what the gate chose."""
        connected = entropy = ratio = 0.0
        if output.choice is not None:
            mask = batch.connected
            connected = mask.sum()
            probabilities = torch.softmax(output.decision_logits, dim=-1)
            entropy_K = -(probabilities * probabilities.clamp_min(1e-30).log()).sum(dim=-1)
            entropy = torch.where(mask, entropy_K, 0.0).sum()
            ratio = torch.where(mask, output.fusion_ratio, 0.0).sum()
            self.step_choices.index_add_(0, self._language_rows(batch), output.choice.to(self.choices.dtype))
        values = (output.loss.detach(), sum(batch.target.lengths), connected, entropy, ratio)
        sums = [torch.as_tensor(value, dtype=torch.float64, device=self.sums.device) for value in values]
        self.step_sums += torch.stack(sums)

    def add_step(self, english_tokens: int, applied: bool) -> None:
        """The end of a step that read so many English tokens on this rank, and whether it changed the weights.

        Of a step that was skipped (guard.py) the tokens count alone: they took their time.
        """
        self.english_tokens += english_tokens
        self.steps += applied
        if applied:
            self.sums += self.step_sums
            self.choices += self.step_choices
        else:
            self.sums[1] += self.step_sums[1]
        self.step_sums.zero_()
        self.step_choices.zero_()

    def _language_rows(self, batch: PackedBatch) -> Tensor:
        """(K,): the row of `choices` that each connected example counts in."""
        languages = torch.tensor([self.index[lang] for lang in batch.langs]).to(self.choices.device, non_blocking=True)
        return languages[batch.connected_rows]

    def read(self) -> dict[str, Any]:
        """The window's figures over all ranks. Every rank must call it."""
        seconds = time.perf_counter() - self.started
        sums = torch.cat([self.sums, self.sums.new_tensor([self.english_tokens])])
        loss, tokens, connected, entropy, ratio, english_tokens = self.group.sum(sums).tolist()
        values: dict[str, Any] = {
            "loss": loss / max(self.steps, 1),
            "tokens_per_second": tokens / seconds,
            "english_tokens_per_second": english_tokens / seconds,
        }
        if connected:
            choices = self.group.sum(self.choices.clone())
            values |= {"gate_entropy": entropy / connected, "fusion_ratio": ratio / connected}
            values["chosen_layers"] = {
                lang: choices[row].tolist() for lang, row in self.index.items() if choices[row].sum() > 0
            }
        return values


def row_cost(model, english_grad: bool) -> RowCost:
    """What a row costs this model in training: FLOPs per token, and a causal triangle of scores per layer."""
    size = size_of(model)
    pair = 2.0 * size.attention_width * len(size.layers)  # QK^T and AV, 2 FLOPs each, half the square
    return RowCost(*flops_per_token(size, english_grad), 3 * pair, (3 if english_grad else 1) * pair)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float:
    """FLOP/s that the device can do at best: a data sheet's for known GPUs, else measured with one matrix product."""
    if device.type == "cuda":
        known = gpu_named(torch.cuda.get_device_name(device))
        if known is not None:
            return known.bf16
    size = 1024
    matrix = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        result = matrix @ matrix
        if device.type == "cuda":
            result.sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
