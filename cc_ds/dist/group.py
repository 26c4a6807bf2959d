"""The process groups: from DeepSpeed's launcher, torchrun, SLURM, or this process alone.

The one place that knows them. With a tensor-parallel size of t, ranks 0 .. t-1 hold one copy of the model between them,
ranks t .. 2t-1 the next, and so on; they are called a tensor group, and the copies are the data-parallel ranks:

    rank          0  1  2  3  4  5      t = 2
    data_rank     0  0  1  1  2  2      which rows: all ranks of a tensor group read the same
    tensor_rank   0  1  0  1  0  1      which slice of every split weight
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

T = TypeVar("T")

FIRST_GPU = Path("/dev/nvidia0")


@dataclass(frozen=True, slots=True)
class Group:
    """Who this process is among the ranks."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    """Which process of its node; ranks of a node are neighbours."""
    tensor_size: int = 1
    """Ranks that share one copy of the model."""
    data_group: dist.ProcessGroup | None = None
    """The ranks that hold the same slice as this one; None: all ranks."""
    tensor_group: dist.ProcessGroup | None = None
    """The ranks that share this one's copy of the model; None: this one alone."""

    @classmethod
    def alone(cls) -> Group:
        """This process without any other."""
        return cls(0, 1, torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks and writes what is written once."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Copies of the model, each with rows of its own."""
        return self.world_size // self.tensor_size

    @property
    def data_rank(self) -> int:
        """Which of them this rank belongs to."""
        return self.rank // self.tensor_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the data-parallel ranks, in place; the tensor stays on its device.

        What the ranks of a tensor group know of their common rows counts once.
        """
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    @property
    def tensor_rank(self) -> int:
        """Which slice of every split weight this rank holds."""
        return self.rank % self.tensor_size

    def tensor_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks that share this one's copy of the model, in place."""
        if self.tensor_size > 1:
            dist.all_reduce(tensor, group=self.tensor_group)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on every rank. Small objects only."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def main_only(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main rank, on every rank; its ValueError is raised on every rank too."""
        result: list[Any] = [None, None]
        if self.is_main:
            try:
                result[0] = work()
            except ValueError as error:
                result[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0)
        if result[1] is not None:
            raise result[1]
        return result[0]


def choose_accelerator() -> bool:
    """Whether this process computes on a GPU, for which it sets torch up; DS_ACCELERATOR=cpu says that it does not."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if on_gpu:
        # On Hopper SDPA prefers cuDNN, which makes a plan for every new length and keeps them all: packed segments and
        # growing caches are nothing but new lengths.
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        # Left to look for a GPU, DeepSpeed, which transformers may import, warns on stdout that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return on_gpu


def collective_limit(step_timeout: float) -> timedelta:
    """How long a rank waits for the others in a collective.

    Longer than the watchdog (watchdog.py), which ends a hanging run with stacks and a code of its own; a day where
    there is none. DEEPSPEED_TIMEOUT, in minutes, comes first.
    """
    if "DEEPSPEED_TIMEOUT" in os.environ:
        return timedelta(minutes=float(os.environ["DEEPSPEED_TIMEOUT"]))
    return timedelta(seconds=max(600.0, step_timeout) + 60.0) if step_timeout else timedelta(days=1)


def start_group(tensor_size: int = 1, step_timeout: float = 0.0) -> Group:
    """Join the process group that the launcher's environment describes, or form one of this process alone.

    Args:
        tensor_size: neighbouring ranks that share one copy of the model.
        step_timeout: the watchdog's limit in seconds; 0: there is no watchdog.

    Raises:
        ValueError: an environment that names a rank but not the rest, ranks that `tensor_size` does not divide, or GPUs
            that torch can't use.
    """
    _check_gpus_are_used()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun")
    on_gpu = choose_accelerator()
    import deepspeed

    if not on_gpu:
        # DeepSpeed would compile its shared-memory collectives here: 39 s, and nothing without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        limit = collective_limit(step_timeout)
        # Groups that DeepSpeed forms later, ZeRO's among them, have torch's own limit: 10 minutes with NCCL.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=limit)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if tensor_size == 1:
        return Group(rank, world_size, device, local_rank)
    if world_size % tensor_size:
        raise ValueError(f"tensor_parallel_size {tensor_size} does not divide the {world_size} ranks of this launch")
    return Group(rank, world_size, device, local_rank, tensor_size, *_tensor_parallel_groups(tensor_size))


def _check_gpus_are_used() -> None:
    """Rather than train on the CPU of a machine with GPUs, without a word, for want of the right torch."""
    has_gpus = FIRST_GPU.exists() or os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
    unwanted = os.environ.get("DS_ACCELERATOR") == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if has_gpus and not unwanted and not torch.cuda.is_available():
        raise ValueError(
            f"this machine has GPUs, but torch {torch.__version__} can't use them: install one with CUDA, which the "
            f"driver knows (TORCH=torch===2.13.0 bash tools/make_venv.sh .venv), or set DS_ACCELERATOR=cpu"
        )


def _tensor_parallel_groups(tensor_size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's data-parallel and tensor-parallel group, which DeepSpeed forms once per process and keeps."""
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=tensor_size)
    return groups.get_data_parallel_group(), groups.get_tensor_model_parallel_group()


def stop_group() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def group_left_after() -> Iterator[None]:
    """Leave the process group after the block.

    A rank that fails ends at once: the others may wait for it in a collective for ever, and it would wait for them. Its
    end is what makes the launcher end theirs.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code and dist.is_initialized() and dist.get_world_size() > 1:
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
        stop_group()
        raise
    stop_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
