"""Train a model with CC-Tuning, or with plain SFT on the same rows.

    deepspeed cc_ds/train.py --config configs/demo.yaml --learning_rate 1e-4      # DeepSpeed's launcher
    torchrun --nproc_per_node 8 cc_ds/train.py --config configs/8b.yaml           # or torchrun
    python cc_ds/train.py --config configs/demo.yaml                              # or one process alone

Every key of cc_ds/config.py is a key of the YAML file and an option of the command line, which wins.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import cc_ds from its parent, and nothing from beside this file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from cc_ds import cli
from cc_ds.assemble import build_data, build_model, build_trainer, export_model
from cc_ds.checkpoint import find_checkpoint
from cc_ds.config import load_config
from cc_ds.dist.group import start_group, stop_group
from cc_ds.telemetry import log, start_logging


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, export."""
    config = load_config(sys.argv[1:] if argv is None else argv)
    train = config.train
    wanted = train.resume_from_checkpoint
    checkpoint = find_checkpoint(wanted, train.output_dir) if wanted else None
    group = start_group()
    start_logging(train.output_dir, group)
    torch.manual_seed(train.seed)

    data = build_data(config, group)
    model, engine_config = build_model(config, group)
    trainer = build_trainer(config, group, data, model, engine_config)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    log.info("%s: %d rows, %d steps, %d ranks", train.method, len(data.train), trainer.total_steps, group.world_size)
    trainer.train()
    if trainer.step == trainer.total_steps:
        export_model(trainer, data, Path(train.output_dir))
    trainer.engine.destroy()


if __name__ == "__main__":
    try:
        cli.run(main)
    finally:
        stop_group()
