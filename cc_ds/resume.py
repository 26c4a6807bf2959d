"""Going on from a checkpoint: on the ranks that wrote it, bit for bit, or on others.

    output_dir/checkpoint-000120/             as it was written
    output_dir/checkpoint-000120.universal/   made from it when other ranks go on from it (dist/universal.py)
        engine/                               DeepSpeed's universal checkpoint
        complete.json                         written last: which checkpoint it was made from, sizes and SHA-256

Other ranks take the same steps: `keep_rows_per_step` changes the accumulation so that a step has as many rows as
before, and rows are dealt, and noise is drawn, by their position in the data. So no row comes twice, none is left out,
and the run differs from the one that kept its ranks by the rounding of sums alone (and by dropout, which is drawn by
rank). The universal folder stays until the next checkpoint is in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cc_ds import checkpoint as checkpoints
from cc_ds.config import READ_SETTINGS, Config
from cc_ds.dist.engine import settings_kept
from cc_ds.dist.group import Group
from cc_ds.dist.patience import main_first
from cc_ds.dist.universal import DISK_FACTOR, Layout, convert, load_universal
from cc_ds.run_state import RunState
from cc_ds.telemetry import log


def layout_state(engine, group: Group, config: Config) -> dict[str, Any]:
    """What `trainer_state.json` says of who wrote a checkpoint, and of what was trained."""
    layout = Layout.of(engine, group.data_size)
    rows = config.train.rows_per_step(group.data_size)
    return {"layout": asdict(layout), "rows_per_step": rows, "trained": _trained(config)}


def check_trained(config: Config, path: Path) -> None:
    """ValueError: the checkpoint at `path` is of a run that trained another model, or other weights of it."""
    former_settings = checkpoints.read_state(path)["trained"]
    for key, now in json.loads(json.dumps(_trained(config))).items():
        if (former := former_settings.get(key)) != now:
            raise ValueError(
                f"{path} was written with {key} {former}, this run has {now}: what is trained can't change in a run; "
                f"give {key} as it was, or begin a new run with --model_name_or_path a tuned model"
            )


def _trained(config: Config) -> dict[str, Any]:
    """The settings that say what the weights compute, which of them the optimiser has, and in how many groups."""
    adapters = ("lora_rank", "lora_alpha", "lora_target_modules") if config.model.lora_rank else ("lora_rank",)
    return {
        "method": config.train.method,
        **{name: getattr(config.model, name) for name in adapters},
        **{name: getattr(config.cc, name) for name in READ_SETTINGS},
        "transform_share": "above 0" if config.cc.transform_share else "0",
        "connection_learning_rate": "none" if config.train.connection_learning_rate is None else "given",
    }


def keep_rows_per_step(config: Config, path: Path | None, ranks: int) -> Config:
    """The settings under which `ranks` ranks take the steps that those of the checkpoint at `path` would have taken.

    `path` None: nothing is resumed, and the settings are as given.

    Raises:
        ValueError: rows per step that these ranks can't make up, or that were changed on the same number of ranks.
    """
    if path is None:
        return config
    state, train = checkpoints.read_state(path), config.train
    wanted, former = state["rows_per_step"], state["layout"]["data_parallel"]
    if train.rows_per_step(ranks) == wanted:
        return config
    per_pass = train.per_device_train_batch_size * ranks
    if former == ranks or wanted % per_pass:
        raise ValueError(
            f"{path} was written by {former} ranks with {wanted} rows a step; {ranks} ranks of "
            f"{train.per_device_train_batch_size} rows and {train.gradient_accumulation_steps} micro-batches take "
            f"{train.rows_per_step(ranks)}, and the schedule counts steps: choose --per_device_train_batch_size and "
            f"--gradient_accumulation_steps so that their product is {wanted / ranks:g}"
        )
    steps = wanted // per_pass
    text = "%s: written by %d ranks; on %d, gradient_accumulation_steps is %d rather than %d, for %d rows a step"
    log.info(text, path.name, former, ranks, steps, train.gradient_accumulation_steps, wanted)
    return replace(config, train=replace(train, gradient_accumulation_steps=steps))


def load_checkpoint(engine, group: Group, run: RunState, path: Path) -> dict[str, Any]:
    """Put a checkpoint into the engine and give back its trainer state; every rank must call it.

    Raises:
        ValueError: files that can't be read, another ZeRO stage, or no room for what has to be made of it.
    """
    state = checkpoints.read_state(path)
    written, ours = Layout(**state["layout"]), Layout.of(engine, group.data_size)
    if written.zero_stage != ours.zero_stage:
        raise ValueError(
            f"{path} was written under ZeRO {written.zero_stage}, this run uses ZeRO {ours.zero_stage}: give "
            f"--deepspeed a configuration of stage {written.zero_stage}"
        )
    universal = written.needs_conversion(ours)
    source = _universal(path, group, run, f"{written}; now {ours}") if universal else path
    try:
        with settings_kept(engine):
            if universal:
                loaded = load_universal(engine, source)
            else:
                loaded = engine.load_checkpoint(str(source), tag="engine")[0]
    except Exception as error:  # DeepSpeed and torch raise many kinds for a damaged file
        raise ValueError(f"{source}: damaged or of another model ({error}); resume from an older one") from error
    if not loaded:
        raise ValueError(f"{source}: DeepSpeed found no engine state there; resume from an older checkpoint")
    return state


def _universal(path: Path, group: Group, run: RunState, why: str) -> Path:
    """The universal form of a checkpoint, from an earlier start or made now; in this run's folder, not the source's."""
    final = run.output_dir / f"{path.name}.universal"
    usable = group.main_only(lambda: final.exists() and _is_of(final, path))
    if usable and checkpoints.digest_damage(final, group) is None:
        log.info("%s was written by %s; using %s", path.name, why, final)
        return final
    # Its ValueErrors reach every rank, however long the others wait.
    with main_first(group, f"converting {path.name}"):
        if group.is_main:
            log.info("converting %s (written by %s) into %s", path.name, why, final)
            _make(path, final, run)
    return final


def _make(path: Path, final: Path, run: RunState) -> None:
    run.check()
    partial = final.with_name(f"{final.name}.partial-{run.generation}")
    for left in (partial, final):
        if left.exists():
            checkpoints.remove(left, "is made anew")
    needed = DISK_FACTOR * sum(file.stat().st_size for file in (path / "engine").iterdir())
    free = shutil.disk_usage(run.output_dir).free
    remedy = "free space there, choose another --output_dir, or resume on the ranks that wrote it"
    if free < needed:
        raise ValueError(
            f"{path.name} must be converted for other ranks, which takes up to {needed / 1e9:.3g} GB in "
            f"{run.output_dir}, where {free / 1e9:.3g} are free: {remedy}"
        )
    try:
        partial.mkdir()
        convert(path / "engine", partial / "engine")
        facts = {"step": checkpoints.step_of(path), "generation": run.generation, "source": _marker_digest(path)}
        checkpoints.write_marker(partial, {}, facts)
    except OSError as error:
        checkpoints.remove(partial, "could not be completed")
        raise ValueError(f"{path} not converted: {error.strerror}; {remedy}") from error
    run.check()
    os.rename(partial, final)


def _is_of(universal: Path, path: Path) -> bool:
    if checkpoints.damage(universal) is not None:
        return False
    marker = json.loads((universal / checkpoints.MARKER).read_text(encoding="utf-8"))
    return marker.get("source") == _marker_digest(path)


def _marker_digest(path: Path) -> str:
    return hashlib.sha256((path / checkpoints.MARKER).read_bytes()).hexdigest()
