"""What tools/make_venv.sh asks pip for, with and without a GPU; the interpreter in its folder only takes notes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "make_venv.sh"


def _executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("gpu", "asked", "torch"),
    [
        (False, None, "torch==2.13.0+cpu"),
        (True, None, "torch===2.13.0"),
        (False, "torch===2.13.0", "torch===2.13.0"),
        (True, "torch==2.13.0+cpu --no-deps", "torch==2.13.0+cpu --no-deps"),
    ],
)
def test_which_torch(gpu, asked, torch, tmp_path):
    _executable(tmp_path / "venv/bin/python", f'echo "[$DS_IGNORE_CUDA_DETECTION] $*" >>{tmp_path}/notes')
    _executable(tmp_path / "bin/nvidia-smi", f"exit {0 if gpu else 1}")
    environment = os.environ | {"PYTHON": sys.executable, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    environment |= {"TORCH": asked or ""}
    subprocess.run(["bash", SCRIPT, tmp_path / "venv"], env=environment, check=True, capture_output=True)
    first, *_, last = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert first.endswith(f"--disable-pip-version-check {torch}")
    # DeepSpeed's setup.py ends with MissingCUDAException on a GPU without nvcc, unless it is told not to look.
    assert last.startswith("[1] ") and last.endswith("--no-build-isolation --editable .[dev]")
