"""The process group: from DeepSpeed's launcher, torchrun, SLURM, or this process alone."""

from __future__ import annotations

import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Group:
    """Who this process is among the data-parallel ranks."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def alone(cls) -> Group:
        """This process without any other."""
        return cls(0, 1, torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that speaks and writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place; the tensor stays on its device."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
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


def choose_accelerator() -> None:
    """Tell DeepSpeed, which transformers may import, that there is no GPU; else it says so on stdout, as a warning."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start_group() -> Group:
    """Join the process group that the launcher's environment describes, or form one of this process alone.

    Raises:
        ValueError: an environment that names a rank but not the rest.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    missing = [name for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun")
    on_gpu = torch.cuda.is_available()
    choose_accelerator()
    import deepspeed

    if not on_gpu:
        # DeepSpeed would compile its shared-memory collectives here: 39 s, and nothing without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    return Group(dist.get_rank(), dist.get_world_size(), device)


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
