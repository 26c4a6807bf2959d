"""Check the nodes of a job before it starts: devices, memory, disk, and a small all-reduce among them.

    srun --ntasks-per-node=1 python tools/health_check.py --gpus 8 --disk outputs/70b

One process per node, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set (slurm/common.sh does); alone, it checks
this node. Rank 0 prints a line per node. Exit code 0: all well; 1: the nodes named are not, or did not answer.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import socket
import sys
import uuid
from pathlib import Path

import torch
import torch.distributed as dist


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must work (default 0)")
    parser.add_argument("--min_memory_gib", type=float, default=1.0, help="available memory needed (default 1)")
    parser.add_argument("--disk", type=Path, default=Path("."), help="folder that must be writable")
    parser.add_argument("--min_disk_gib", type=float, default=1.0, help="space needed there (default 1)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for the others (default 120)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check this node, then all of them together; the exit code says whether all are well."""
    args = parse(argv)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    problems = check_node(args.gpus, args.min_memory_gib, args.disk, args.min_disk_gib)
    report = {"node": socket.gethostname(), "rank": rank, "problems": problems}
    reports = [report]
    if world_size > 1:
        wait = datetime.timedelta(seconds=args.timeout)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = dist.TCPStore(address, port, world_size, rank == 0, wait, wait_for_workers=False)
            store.set(f"node{rank}", json.dumps(report))
        except (RuntimeError, dist.DistError) as error:
            report["problems"].append(f"can't reach {address}:{port} ({_first_line(error)})")
            print_reports(reports)
            return 1
        if rank == 0:
            reports = [report, *collect(store, world_size)]
        if len(reports) < world_size or not any("did not answer" in item["problems"] for item in reports):
            problem = all_reduce(store, rank, world_size, wait, args.gpus > 0)
            report["problems"] += [problem] if problem is not None else []
    if rank == 0 or report["problems"]:
        print_reports(reports)
    return int(any(item["problems"] for item in reports))


def check_node(gpus: int, memory_gib: float, folder: Path, disk_gib: float) -> list[str]:
    """What is wrong with this node."""
    problems = []
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < gpus:
        problems.append(f"{found} of {gpus} GPUs are seen")
    for index in range(min(found, gpus)):
        try:
            matrix = torch.ones(1024, 1024, device=f"cuda:{index}")
            if float((matrix @ matrix).sum()) != 1024.0**3:
                problems.append(f"GPU {index} computes wrongly")
        except RuntimeError as error:
            problems.append(f"GPU {index} fails ({_first_line(error)})")
    available = _available_memory_gib()
    if available < memory_gib:
        problems.append(f"{available:.1f} GiB of memory are available, {memory_gib:g} are needed")
    probe = folder / f".health-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free / 2**30
        if free < disk_gib:
            problems.append(f"{folder} has {free:.1f} GiB free, {disk_gib:g} are needed")
    except OSError as error:
        problems.append(f"{folder} can't be written ({error.strerror})")
    return problems


def collect(store: dist.TCPStore, world_size: int) -> list[dict]:
    """What each other node says; a node that says nothing in time is a problem of its own."""
    reports = []
    names = os.environ.get("NODE_NAMES", "").split()
    for rank in range(1, world_size):
        try:
            reports.append(json.loads(store.get(f"node{rank}")))
        except (RuntimeError, dist.DistError):
            name = names[rank] if rank < len(names) else f"the node of task {rank}"
            reports.append({"node": name, "rank": rank, "problems": ["did not answer"]})
    return reports


def all_reduce(store, rank: int, world_size: int, wait: datetime.timedelta, on_gpu: bool) -> str | None:
    """A sum over the nodes; what went wrong, or None."""
    device = torch.device("cuda", 0) if on_gpu and torch.cuda.is_available() else torch.device("cpu")
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
        values = torch.full((1 << 20,), float(rank + 1), device=device)
        dist.all_reduce(values)
        right = bool((values == world_size * (world_size + 1) / 2).all())
        dist.destroy_process_group()
    except (RuntimeError, dist.DistError) as error:
        return f"the all-reduce failed ({_first_line(error)})"
    return None if right else "the all-reduce gave a wrong sum"


def print_reports(reports: list[dict]) -> None:
    """One line for each node, which names what is wrong with it."""
    for report in reports:
        verdict = f"BAD: {'; '.join(report['problems'])}" if report["problems"] else "well"
        print(f"health check: node {report['node']} (task {report['rank']}): {verdict}", flush=True)


def _available_memory_gib() -> float:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


if __name__ == "__main__":
    sys.exit(main())
