"""Who may write into output_dir, and how the run there ended.

    output_dir/generations/000003.json    one file per start: host, process, job; the highest number is in charge
    output_dir/run_state.json             {"state", "attempt", "generation", "step", "message"}, for scripts

A cluster can start a job again while a rank of the former start still runs behind a cut network. Each start therefore
claims the next generation, and a process that finds a newer one than its own stops without writing (`RunState.check`).

States: running (also what a crash leaves behind), finished, preempted (by USR1: start me again), terminated (by TERM),
stopped (by a stop_now file or stop_after_steps), error (a mistake that another start would repeat). All but running and
error come after a checkpoint or the end.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

from cc_ds.dist.group import Group

STATE_FILE = "run_state.json"
# On a full disk a file can be overwritten but not grow: the state keeps this size from its first byte on.
_STATE_BYTES = 2048


class StaleRunError(ValueError):
    """A newer start of the run has taken over output_dir."""


class RunState:
    """This start's claim on output_dir. A context manager: a user's mistake inside is recorded as the state error."""

    def __init__(self, output_dir: str | Path, group: Group) -> None:
        self.output_dir = Path(output_dir)
        self.generation: int = group.main_only(lambda: _claim(self.output_dir / "generations"))
        self.step = 0  # of the newest checkpoint
        if group.is_main:
            self.write("running")

    def check(self) -> None:
        """Raises StaleRunError when a newer start has claimed output_dir. Cheap: it lists one small folder."""
        folder = self.output_dir / "generations"
        newest = max(_numbers(folder), default=0)
        if newest > self.generation:
            raise StaleRunError(
                f"{self.output_dir} was taken over by a newer start (generation {newest}: "
                f"{(folder / _name(newest)).read_text(encoding='utf-8').strip()}); this one (generation "
                f"{self.generation}) stops and writes nothing more. End it if it was started by mistake"
            )

    def write(self, state: str, message: str = "") -> None:
        """Record the state in place."""
        values = {"state": state, "attempt": attempt(), "generation": self.generation, "step": self.step}
        text = json.dumps(values | {"message": message[:1000]})
        path = self.output_dir / STATE_FILE
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.write((text.ljust(_STATE_BYTES - 1)[: _STATE_BYTES - 1] + "\n").encode())

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        mistakes = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)  # as in cli.run
        if isinstance(error, mistakes) and not isinstance(error, StaleRunError):
            self.write("error", str(error))


def attempt() -> str:
    """Names this start of a SLURM job, "JOB.RESTARTS"; "" outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def _claim(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    claim = {"host": socket.gethostname(), "pid": os.getpid(), "attempt": attempt(), "time": int(time.time())}
    while True:
        number = max(_numbers(folder), default=0) + 1
        try:
            # O_EXCL: of two starts at once, one gets the number and the other the next.
            with open(folder / _name(number), "x", encoding="utf-8") as file:
                file.write(json.dumps(claim) + "\n")
            return number
        except FileExistsError:
            continue


def _numbers(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.json") if re.fullmatch(r"\d+", path.stem)]


def _name(number: int) -> str:
    return f"{number:06d}.json"
