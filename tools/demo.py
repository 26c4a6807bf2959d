"""The whole walk on an embedded task: no hub, no account, no GPU.

python tools/demo.py --output demo_output --seeds 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a file of tools/ must not shadow a library

from cc_ds import cli


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo_output", help="folder, emptied first (default demo_output)")
    parser.add_argument("--seeds", type=cli.positive, default=1, help="tunings per method (default 1)")
    args = parser.parse_args(argv)
    from cc_ds.demo.run import run_demo

    configs = Path(__file__).resolve().parents[1] / "configs"
    report = run_demo(args.output, args.seeds, str(configs / "demo.yaml"), str(configs / "demo_warmup.yaml"))
    print(f"\nReport: {report}")


if __name__ == "__main__":
    cli.run(main)
