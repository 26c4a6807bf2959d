"""Checkpoints: written beside, renamed when whole, checked before they are trusted.

    output_dir/checkpoint-000120/
        engine/              weights, optimiser and schedule, as DeepSpeed writes them
        model/               config and tokenizer, so that tools/export.py needs nothing else
        trainer_state.json   step, data position, and the layout of the ranks that wrote it
        complete.json        written last: size and SHA-256 of every other file
    output_dir/checkpoint-000140.partial-3/    being written by generation 3 (run_state.py), or left by its end

Noise, dropout and data order are functions of the seed and the step, so no generator has a state to keep.
A checkpoint counts when every rank has written its part; one that is damaged is named and skipped, and stays where it
is for its owner to look at.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cc_ds.dist.group import Group
from cc_ds.run_state import RunState
from cc_ds.telemetry import log

_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"checkpoint-\d+(?:\.universal)?\.partial-(\d+)")
_STATE = "trainer_state.json"
MARKER = "complete.json"
_REMEDY = "free space there or choose another --output_dir, then start again with --resume_from_checkpoint latest"


# ---- writing ----


def save_checkpoint(
    engine,
    group: Group,
    run: RunState,
    state: dict[str, Any],
    *,
    keep: int,
    keep_every: int = 0,
    describe: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint at `state["step"]`; every rank must call it.

    Args:
        keep: the newest whole checkpoints to keep; older ones are removed once this one is in place.
        keep_every: those whose step is a multiple of it are kept for ever; 0: none.
        describe: writes config and tokenizer into a folder; called on the main rank.

    Raises:
        ValueError: on every rank: a file that could not be written (a full disk), or a newer start of the run. The
            older checkpoints are untouched.
    """
    final = run.output_dir / f"checkpoint-{state['step']:06d}"
    partial = final.with_name(f"{final.name}.partial-{run.generation}")

    def prepare() -> None:
        run.check()
        if partial.exists():
            remove(partial, "was never completed")

    group.main_only(prepare)
    engine.checkpoint_engine.start()
    engine.save_checkpoint(str(partial), tag="engine", save_latest=False)
    writer = engine.checkpoint_engine
    reports = group.gather((group.rank, writer.error, {path: asdict(file) for path, file in writer.files.items()}))
    failed = [f"rank {rank}: {error}" for rank, error, _ in reports if error is not None]
    files = {os.path.relpath(path, partial): file for _, _, written in reports for path, file in written.items()}

    def complete() -> None:
        try:
            if failed:
                raise OSError(0, failed[0])
            if describe is not None:
                describe(partial / "model")
            _write_text(partial / _STATE, json.dumps(state, indent=2) + "\n")
            write_marker(partial, files, {"step": state["step"], "generation": run.generation})
        except OSError as error:
            remove(partial, "could not be completed")
            raise ValueError(f"checkpoint not written: {error.filename or ''} {error.strerror}; {_REMEDY}") from error
        run.check()
        _put_in_place(partial, final)
        _remove_old(run, keep, keep_every)

    group.main_only(complete)
    return final


def write_marker(partial: Path, files: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    """The file that makes a folder whole: `facts`, and size and SHA-256 of every file; `files` are known already."""
    for path in sorted(partial.rglob("*")):  # what did not pass through the writer
        name = str(path.relative_to(partial))
        if path.is_file() and name not in files:
            files[name] = {"size": path.stat().st_size, "sha256": _digest(path)}
    _write_text(partial / MARKER, json.dumps(facts | {"files": dict(sorted(files.items()))}, indent=1) + "\n")


def _put_in_place(partial: Path, final: Path) -> None:
    aside = None
    if final.exists():
        whole = damage(final) is None
        aside = _free_name(final, "replaced" if whole else "damaged")
        final.rename(aside)
        if not whole:
            log.warning("%s was damaged and is now %s", final, aside)
    partial.rename(final)
    _sync_folder(final.parent)
    if aside is not None and aside.name.startswith(f"{final.name}.replaced"):
        remove(aside, "was written again")


def _remove_old(run: RunState, keep: int, keep_every: int) -> None:
    whole = [path for path in list_checkpoints(run.output_dir) if damage(path) is None]
    for path in whole[:-keep]:
        if not keep_every or step_of(path) % keep_every:
            shutil.rmtree(path)
    for path in run.output_dir.glob("checkpoint-*.universal"):  # made for a resume (resume.py), which is over
        remove(path, "is superseded")
    for path in run.output_dir.glob("checkpoint-*.partial-*"):
        match = _PARTIAL.fullmatch(path.name)
        if match and int(match[1]) < run.generation:
            remove(path, f"was never completed by generation {match[1]}")


# ---- finding ----


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(_NAME.fullmatch(path.name)[1])


def find_checkpoint(
    wanted: str, output_dir: str | Path, group: Group | None = None, digests: bool = False
) -> Path | None:
    """The folder to resume from; with a group every rank must call it, and gets the same answer.

    "latest" is the newest whole one: damaged newer ones are named and set aside as checkpoint-N.damaged-1. In a run
    that has none yet it is None, and the run starts anew.

    Args:
        digests: read every file and compare its SHA-256 too, each rank its share; else names and sizes alone.

    Raises:
        ValueError: the folder named is not a whole checkpoint, or "latest" found damaged ones alone.
    """
    group = group or Group.alone()
    candidates = [Path(wanted)]
    if wanted == "latest":
        candidates = group.main_only(lambda: list_checkpoints(output_dir)[::-1])
    problems = []
    for path in candidates:
        problem = group.main_only(lambda path=path: damage(path))
        if problem is None and digests:
            problem = digest_damage(path, group)
        if problem is None:
            group.main_only(lambda: _set_aside(candidates[: len(problems)], problems))
            return path
        problems.append(f"{path}: {problem}")
    if not problems:
        return None
    if wanted == "latest":
        raise ValueError(f"no whole checkpoint in {output_dir}: {'; '.join(problems)}")
    there = ", ".join(str(item) for item in list_checkpoints(output_dir) if damage(item) is None) or "none"
    raise ValueError(f"{problems[0]}; whole ones in {output_dir}: {there}")


def set_aside_later(output_dir: str | Path, step: int) -> None:
    """Rename the checkpoints of steps after `step`, where a run begins: they are of another course than it takes, and
    "latest" would find them before its own."""
    for path in list_checkpoints(output_dir):
        if step_of(path) > step:
            aside = _free_name(path, "superseded")
            path.rename(aside)
            log.warning("this run begins at step %d; %s is now %s: remove it when you don't need it", step, path, aside)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by the names and sizes of its files; None: nothing."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        files = {name: file["size"] for name, file in marker["files"].items()}
    except FileNotFoundError:
        return f"not a whole checkpoint (no {MARKER})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"damaged: {MARKER} can't be read ({error})"
    for name, size in files.items():
        if not (path / name).is_file():
            return f"not a whole checkpoint (no {name})"
        found = (path / name).stat().st_size
        if found != size:
            return f"damaged: {name} has {found} bytes, not the {size} that were written"
    return None


def digest_damage(path: Path, group: Group | None = None) -> str | None:
    """What is wrong with a checkpoint by the SHA-256 of its files; None: nothing. Every rank must call it."""
    group = group or Group.alone()
    files = sorted(json.loads((path / MARKER).read_text(encoding="utf-8"))["files"].items())
    problem = None
    for name, file in files[group.rank :: group.world_size]:
        try:
            if _digest(path / name) != file["sha256"]:
                problem = problem or f"damaged: {name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            problem = problem or f"damaged: {name} can't be read ({error.strerror})"
    return next((found for found in group.gather(problem) if found is not None), None)


# ---- reading ----


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's trainer state.

    Raises:
        ValueError: it can't be read.
    """
    try:
        return json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path / _STATE}: can't be read ({error}); resume from an older checkpoint") from error


# ---- small parts ----


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _set_aside(damaged: list[Path], problems: list[str]) -> None:
    for path, problem in zip(damaged, problems):
        aside = _free_name(path, "damaged")
        path.rename(aside)
        log.warning("%s; skipped, and kept as %s", problem, aside.name)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path, reason: str) -> None:
    """Remove a folder, and say so."""
    log.info("removing %s, which %s", path, reason)
    shutil.rmtree(path)


def _free_name(path: Path, word: str) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return candidate
