"""Train a model with CC-Tuning, or with plain SFT on the same rows.

    deepspeed cc_ds/train.py --config configs/demo.yaml --learning_rate 1e-4      # DeepSpeed's launcher
    torchrun --nproc_per_node 8 cc_ds/train.py --config configs/8b.yaml           # or torchrun
    sbatch slurm/train_8b.sh                                                      # or SLURM
    python cc_ds/train.py --config configs/demo.yaml                              # or one process alone

Every key of cc_ds/config.py is a key of the YAML file and an option of the command line, which wins. Exit codes: 0 at
the end or when asked to stop (run_state.json says which), 2 for a mistake named in one line, 124 from the watchdog.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import cc_ds from its parent, and nothing from beside this file
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from cc_ds import cli
from cc_ds.assemble import build_data, build_model, build_trainer, export_model, with_stored_connection
from cc_ds.checkpoint import find_checkpoint, set_aside_later
from cc_ds.config import Config, load_config
from cc_ds.dist.group import Group, group_left_after, start_group
from cc_ds.dist.signals import Request, Requests
from cc_ds.resume import check_trained, keep_rows_per_step
from cc_ds.run_state import RunState
from cc_ds.telemetry import log, start_logging

_STATES = {
    Request.NONE: "finished",
    Request.PREEMPT: "preempted",
    Request.TERMINATE: "terminated",
    Request.STOP: "stopped",
}


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, export."""
    config = load_config(sys.argv[1:] if argv is None else argv)
    requests = Requests(config.train.output_dir)
    group = start_group(config.train.tensor_parallel_size, config.train.step_timeout)
    start_logging(config.train.output_dir, group)
    torch.manual_seed(config.train.seed)
    with RunState(config.train.output_dir, group) as run:
        requests.join(group)
        state = train(config, group, run, requests)
        if group.is_main:
            run.write(state)
    requests.close()


def train(config: Config, group: Group, run: RunState, requests: Requests) -> str:
    """Build the parts, resume, train, export. Returns the state the run ends in (run_state.py)."""
    config = with_stored_connection(config, group)
    settings = config.train
    wanted, digests = settings.resume_from_checkpoint, settings.verify_checkpoint == "digests"
    checkpoint = find_checkpoint(wanted, settings.output_dir, group, digests) if wanted else None
    if checkpoint is not None:
        check_trained(config, checkpoint)
    config = keep_rows_per_step(config, checkpoint, group.data_size)
    data = build_data(config, group)
    model, engine_config = build_model(config, group)
    trainer = build_trainer(config, group, data, model, engine_config, run, requests)
    if checkpoint is not None:
        trainer.resume(checkpoint)
    group.main_only(lambda: set_aside_later(settings.output_dir, trainer.step))
    log.info("%s: %d rows, %d steps, %d ranks", settings.method, len(data.train), trainer.total_steps, group.world_size)
    request = trainer.train()
    finished = trainer.step == trainer.total_steps
    if finished:
        group.main_only(run.check)
        export_model(trainer, data, Path(settings.output_dir))
    trainer.engine.destroy()
    run.step = trainer.step
    return _STATES[request] if finished or request else "stopped"


if __name__ == "__main__":
    with group_left_after():
        cli.run(main)
