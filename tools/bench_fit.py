"""What the fit costs, beside numpy.linalg.lstsq on the same rows.

    python tools/bench_fit.py --hidden 2048 --rows 16000                 # both, in one run
    python tools/bench_fit.py --hidden 8192 --rows 80000 --no_lstsq      # streamed from shards: time and peak memory

Rows are float32, S with singular values over two orders of magnitude, E = S T + noise. With --no_lstsq they are first
written as shards, in a process of their own, and read from there as the tool reads them. Peak memory is resident
memory, mapped files included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

import numpy as np
import torch

from cc_ds import cli
from cc_ds.eval.run import write_json
from cc_ds.telemetry import peak_memory_bytes
from cc_ds.transform.fit import fit_problems, fit_transform_result
from cc_ds.transform.shards import shard_path, shard_problems, write_shard

_SHARD_ROWS = 2048


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=cli.positive, default=2048)
    parser.add_argument("--rows", type=cli.positive, default=16000, help="N x L")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="of ours; lstsq runs once")
    parser.add_argument("--threads", type=cli.positive, default=2)
    parser.add_argument("--ridge", default="0", help="a number (default 0) or auto")
    parser.add_argument("--no_lstsq", action="store_true", help="ours alone, from shards")
    parser.add_argument("--output", type=Path, help="json file for every figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write json on request."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    ridge = args.ridge if args.ridge == "auto" else float(args.ridge)
    result = (from_shards if args.no_lstsq else against_lstsq)(args, ridge)
    for name, value in result.items():
        print(f"{name:<28} {value}")
    if args.output:
        write_json({"settings": {key: str(value) for key, value in vars(args).items()}, **result}, args.output)


def rows_of(hidden: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S and E, (rows, 1, H) float32; the same mixing for every seed."""
    mixing = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -2, hidden)[torch.randperm(hidden, generator=mixing)]
    # A sparse rotation is enough to mix columns, and cheap at any size.
    turn = torch.linalg.qr(torch.randn(64, 64, generator=mixing)).Q
    draw = torch.Generator().manual_seed(seed + 1)
    source = (torch.randn(rows, hidden, generator=draw) * scales).unflatten(1, (-1, 64)) @ turn
    source = source.flatten(1)
    target = source.flip(1) + 0.5 * source + 0.1 * torch.randn(rows, hidden, generator=draw)
    return source[:, None], target[:, None]


def against_lstsq(args: argparse.Namespace, ridge: float | str) -> dict:
    """Seconds and residuals of our fit (`rounds` times) and of numpy's lstsq (once) on the same float32 rows."""
    source, target = rows_of(args.hidden, args.rows, 0)
    s, e = source[:, 0], target[:, 0]
    seconds = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        fitted = fit_transform_result(source, target, ridge=ridge)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    best = torch.from_numpy(np.linalg.lstsq(s.numpy(), e.numpy(), rcond=None)[0])
    lstsq = time.perf_counter() - start
    ours, theirs = (residual(s, e, matrix) for matrix in (fitted.transform.matrix, best))
    return {
        "ours, seconds": [round(value, 2) for value in seconds],
        "lstsq, seconds": round(lstsq, 2),
        "times faster": [round(lstsq / value, 1) for value in seconds],
        "residual over lstsq's, less 1": ours / theirs - 1,
        "condition": fitted.condition[0],
    }


def residual(source: torch.Tensor, target: torch.Tensor, matrix: torch.Tensor) -> float:
    """|S W - E| in float64, block by block."""
    blocks = zip(source.split(_SHARD_ROWS), target.split(_SHARD_ROWS))
    return sum(float((s.double() @ matrix.double() - e.double()).square().sum()) for s, e in blocks) ** 0.5


def from_shards(args: argparse.Namespace, ridge: float | str) -> dict:
    """Seconds and peak resident memory of a fit that reads its rows from shards on disk.

    Raises:
        ValueError: the shards could not be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # Elsewhere, so that making the rows does not count in the peak.
        maker = multiprocessing.get_context("spawn").Process(target=write_rows, args=(args.hidden, args.rows, folder))
        maker.start()
        maker.join()
        if maker.exitcode != 0:
            raise ValueError(f"writing {args.rows} rows into {folder} failed; is the disk full?")
        ids = range(args.rows)
        choosing = set(ids[4::5]) if ridge == "auto" else set()
        start = time.perf_counter()
        fitted = fit_problems(
            shard_problems(folder, "shared", set(ids) - choosing, choosing), args.hidden, "shared", ridge=ridge
        )
        seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "peak resident GB": round(peak_memory_bytes(torch.device("cpu")) / 1e9, 2),
        "data GB": round(2 * args.rows * args.hidden * 4 / 1e9, 2),
        "ridge": fitted.ridge[0],
        "relative error": fitted.relative_error[0],
        "rank": fitted.rank[0],
    }


def write_rows(hidden: int, rows: int, folder: Path) -> None:
    """Shards of one layer."""
    for number, start in enumerate(range(0, rows, _SHARD_ROWS)):
        count = min(_SHARD_ROWS, rows - start)
        source, target = rows_of(hidden, count, number)
        ids = torch.arange(start, start + count)
        tensors = {"source": source, "target": target.contiguous(), "pair_id": ids, "english_id": ids.clone()}
        write_shard(tensors, ["und"] * count, shard_path(folder, number))


if __name__ == "__main__":
    cli.run(main)
