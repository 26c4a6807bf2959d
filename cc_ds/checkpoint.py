"""Checkpoints: written beside, renamed when whole, the newest N kept; resumed exactly.

    output_dir/checkpoint-000120/
        engine/              weights, optimiser and schedule, as DeepSpeed writes them
        trainer_state.json   step and data position

Noise, dropout and data order are functions of the seed and the step, so no generator has a state to keep.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from cc_ds.dist.group import Group

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.json"


def save_checkpoint(engine, group: Group, output_dir: str | Path, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint at `state["step"]`; every rank must call it. Older ones beyond `keep` are removed after."""
    final = Path(output_dir) / f"checkpoint-{state['step']:06d}"
    partial = final.with_name(final.name + ".partial")
    if group.is_main and partial.exists():
        shutil.rmtree(partial)
    group.barrier()
    engine.save_checkpoint(str(partial), tag="engine")
    group.barrier()
    if group.is_main:
        (partial / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    group.barrier()
    return final


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]))


def find_checkpoint(wanted: str, output_dir: str | Path) -> Path | None:
    """The folder to resume from; "latest" in a run that has none yet is None, and the run starts anew.

    Raises:
        ValueError: a folder that does not exist or is not a whole checkpoint.
    """
    if wanted == "latest":
        return (list_checkpoints(output_dir) or [None])[-1]
    path = Path(wanted)
    if not (path / _STATE).is_file():
        there = ", ".join(str(item) for item in list_checkpoints(output_dir)) or "none"
        raise ValueError(f"{path}: not a whole checkpoint (no {_STATE}); whole ones in {output_dir}: {there}")
    return path


def load_checkpoint(engine, path: Path) -> dict[str, Any]:
    """Put a checkpoint into the engine and give back its trainer state; every rank must call it.

    Raises:
        ValueError: a state file or engine files that can't be read.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / _STATE}: can't be read ({error}); resume from an older checkpoint") from error
    try:
        loaded, _ = engine.load_checkpoint(str(path), tag="engine")
    except Exception as error:  # DeepSpeed and torch raise many kinds for a damaged file
        raise ValueError(f"{path}: damaged or of another layout ({error}); resume from an older one") from error
    if loaded is None:
        raise ValueError(f"{path}: DeepSpeed found no engine state there; resume from an older checkpoint")
    return state
