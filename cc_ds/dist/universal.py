"""DeepSpeed's universal checkpoints: what a checkpoint becomes when other ranks than those that wrote it go on from it.

An engine's own files hold slices cut for its ranks. They are joined into one folder per parameter (float32 weight and
both moments), from which an engine of any number of ranks, tensor-parallel ones included, cuts its own. ZeRO 1 and 2:
by DeepSpeed's converter, in a process of its own: it forks workers, which a process with a GPU and open connections
should not, and its memory goes with it. ZeRO-3: by consolidate.py, one parameter after another, because DeepSpeed's
converter (0.19.8) takes what tensor parallelism leaves whole to be partitioned over the data-parallel ranks alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cc_ds.dist.consolidate import common_optimizer_state, trained_states

# Fragments, then whole parameters beside them: 12 bytes a parameter each. The files that hold optimiser slices have
# those 12 bytes too, so this many times the source is enough.
DISK_FACTOR = 2
_MOST_WORKERS = 8
_SMALL_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Layout:
    """How an engine's state is cut."""

    data_parallel: int
    """Ranks that share the optimiser's state."""
    tensor_parallel: int
    """Ranks that share each weight."""
    zero_stage: int

    @classmethod
    def of(cls, engine, data_parallel: int) -> Layout:
        """An engine's."""
        return cls(data_parallel, max(1, engine.autotp_size()), engine.zero_optimization_stage())

    def needs_conversion(self, other: Layout) -> bool:
        """Whether the other's files can't be read as they are. ZeRO 0 has no slices of the optimiser's state."""
        same_ranks = self.data_parallel == other.data_parallel or self.zero_stage == 0
        return not (same_ranks and self.tensor_parallel == other.tensor_parallel)

    def __str__(self) -> str:
        tensor = f" x {self.tensor_parallel} tensor-parallel" if self.tensor_parallel > 1 else ""
        return f"{self.data_parallel} ranks{tensor}, ZeRO {self.zero_stage}"


def convert(engine_folder: Path, output: Path) -> None:
    """Write `engine_folder` as a universal checkpoint into `output`. Runs for minutes to hours.

    Raises:
        OSError: no room, or the converter failed; its last words are the message.
        ValueError: files that can't be read.
    """
    if any(engine_folder.glob("zero_pp_rank_*_model_states.pt")):
        _join_zero3(engine_folder, output)
    else:
        _run_converter(engine_folder, output)


def _join_zero3(engine_folder: Path, output: Path) -> None:
    for name, states in trained_states(engine_folder):
        folder = output / "zero" / name
        folder.mkdir(parents=True)
        for state, tensor in states.items():
            torch.save({"param": tensor.read()}, folder / f"{state}.pt")
    torch.save(common_optimizer_state(engine_folder), output / "zero" / "optimizer_state.pt")
    for file in engine_folder.glob("zero_pp_rank_0_mp_rank_*_model_states.pt"):
        shutil.copy(file, output)


def _run_converter(engine_folder: Path, output: Path) -> None:
    workers = _workers(engine_folder)
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(engine_folder),
        "--output_folder", str(output), "--num_extract_workers", str(workers), "--num_merge_workers", str(workers),
        "--inject_missing_state",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"code {done.returncode}"]
        raise OSError(0, words[-1], str(output))


def load_universal(engine, folder: Path) -> bool:
    """Put a universal checkpoint, in `folder`/engine, into the engine; False: nothing is there. On every rank.

    Frozen parameters stay as they are: they come from the base model, not from the checkpoint.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag="engine")
    finally:
        engine._config.load_universal_checkpoint = False
    # At stage 3 DeepSpeed 0.19.8 gives all of them one and the same step tensor, which Adam then raises once for each;
    # and at every stage it leaves it on the CPU, where a fused Adam of parameters on a GPU does not take it.
    for parameter, state in optimizer.state.items():
        state["step"] = state["step"].to(parameter.device, copy=True)
    return loaded is not None


def _workers(engine_folder: Path) -> int:
    """As many as half of the free memory holds: each reads the file of a rank."""
    largest = max((file.stat().st_size for file in engine_folder.glob("*optim_states.pt")), default=0)
    if largest < _SMALL_BYTES:
        return 1
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(_MOST_WORKERS, os.cpu_count() or 1, free // (2 * largest)))
