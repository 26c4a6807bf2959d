"""Turn a training checkpoint into a model folder that plain transformers loads, shard by shard, on one CPU node.

    python tools/export.py --checkpoint outputs/70b/checkpoint-002000 --output exported/70b

No process group, no GPU, and no more memory than the interpreter's and one shard's (--max_shard_gb): weights are read
from the mapped checkpoint files one parameter at a time, from ZeRO 0, 1, 2 or 3.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from cc_ds import cli
from cc_ds.checkpoint import find_checkpoint
from cc_ds.export import export_checkpoint


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint-N folder of a run")
    parser.add_argument("--output", required=True, type=Path, help="folder for the model")
    parser.add_argument("--max_shard_gb", type=float, default=4.0, help="of a weights file, in 10^9 bytes (default 4)")
    parser.add_argument("--no_verify", action="store_true", help="do not compare the checkpoint's SHA-256 sums first")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Export a checkpoint."""
    args = parse(argv)
    if str(args.checkpoint) == "latest":
        raise ValueError("--checkpoint names a checkpoint-N folder of a run; there is no latest one without the run")
    checkpoint = find_checkpoint(str(args.checkpoint), args.checkpoint.parent, digests=not args.no_verify)
    peak = export_checkpoint(checkpoint, args.output, int(args.max_shard_gb * 1e9))
    print(f"{args.output}: exported from {checkpoint}; peak memory {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    cli.run(main)
