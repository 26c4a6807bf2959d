"""A process that hangs ends with its stacks in its log; one that beats does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WATCHDOG = Path(__file__).resolve().parents[3] / "cc_ds" / "dist" / "watchdog.py"
PROGRAM = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("watchdog", {path!r})
watchdog = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watchdog)
watchdog._SECONDS_FOR_THE_OTHERS = 0.2
dog = watchdog.Watchdog({log!r}, 0.5)
dog.start()
for step in range(4):
    time.sleep(0.2)
    dog.beat(step)
{end}
"""


def run(tmp_path: Path, end: str) -> tuple[int, str, str]:
    log = tmp_path / "rank0.log"
    program = PROGRAM.format(path=str(WATCHDOG), log=str(log), end=end)
    done = subprocess.run([sys.executable, "-c", program], timeout=30, capture_output=True, text=True, check=False)
    return done.returncode, log.read_text(), done.stderr


def test_a_hang(tmp_path):
    code, log, stderr = run(tmp_path, "def wait_for_ever():\n    time.sleep(60)\nwait_for_ever()")
    assert code == 124
    assert "no step for 0.5 seconds after step 3" in log and "in wait_for_ever" in log
    assert "stacks are in" in stderr


def test_a_hang_that_holds_the_lock(tmp_path):
    # A regular expression that backtracks for hours, in C and without letting another thread run.
    code, log, _ = run(tmp_path, "import re\nre.match('(a|a)*b', 'a' * 64)")
    assert code == 1
    assert "re/__init__.py" in log or "in match" in log


@pytest.mark.parametrize("end", ["dog.stop()\ntime.sleep(2)", "dog.stop()"])
def test_an_end_in_time(tmp_path, end):
    assert run(tmp_path, end)[:2] == (0, "")
