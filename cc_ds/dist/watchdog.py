"""A run that hangs must end, and say where it hung.

When no step has ended within the limit, each rank writes the Python stacks of all its threads to its own log and the
process ends with code 124 (as timeout(1) does), which ends the job. Every rank notices by itself: a hang of one stops
all. A second timer, in C, covers a thread that hangs while it holds Python's global lock; its code is 1.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

EXIT_CODE = 124
# The ranks notice within moments of each other, and the first to end makes the launcher kill the rest.
_SECONDS_FOR_THE_OTHERS = 5.0


class Watchdog:
    """Watches from `start` to `stop`; `beat` is a sign of life."""

    def __init__(self, log_file: str | Path, limit: float) -> None:
        """`limit`: seconds without a step; 0: never end."""
        self.log_file, self.limit = Path(log_file), limit

    def start(self) -> None:
        """Begin to watch."""
        if not self.limit:
            return
        self._log = open(self.log_file, "a", encoding="utf-8")
        self._done = threading.Event()
        self.beat(0)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int) -> None:
        """A step has ended, or something else that shows progress."""
        if not self.limit:
            return
        self._step, self._last = step, time.monotonic()
        last_resort = self.limit + 2 * _SECONDS_FOR_THE_OTHERS + 1
        faulthandler.dump_traceback_later(last_resort, exit=True, file=self._log)

    def stop(self) -> None:
        """Watch no longer."""
        if not self.limit:
            return
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._log.close()

    def _watch(self) -> None:
        while not self._done.wait(max(0.1, self._last + self.limit - time.monotonic())):
            if time.monotonic() - self._last >= self.limit:
                self._end()

    def _end(self) -> None:
        text = (
            f"no step for {self.limit:g} seconds after step {self._step} (--step_timeout): the process ends with code "
            f"{EXIT_CODE}; the stacks of all threads, innermost call first:\n"
        )
        self._log.write(text)
        self._log.flush()
        faulthandler.dump_traceback(file=self._log, all_threads=True)
        os.write(2, f"error: {text.splitlines()[0].split(':')[0]}; stacks are in {self.log_file}\n".encode())
        time.sleep(_SECONDS_FOR_THE_OTHERS)
        os._exit(EXIT_CODE)
