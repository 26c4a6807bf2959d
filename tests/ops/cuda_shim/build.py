"""Builds the CUDA source for the CPU: as torch operators, or as a program for the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

SHIM = Path(__file__).parent
CSRC = SHIM.parent.parent.parent / "cc_ds" / "ops" / "csrc"
KERNELS = ("forward.cu", "backward.cu")
COMPILER = shutil.which("g++")
NO_COMPILER = "there is no g++ here to compile the CUDA source for the CPU with"

_FLAGS = [
    "-std=c++20",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-DTORCH_TARGET_VERSION=0x020d000000000000",
]


def compile_to(output: Path, sources: list[Path], flags: list[str], csrc: Path = CSRC) -> Path:
    """Run g++ with the shim in place of the CUDA toolkit; a .cu file counts as C++ with shim.h before it."""
    includes = [f"-I{folder}" for folder in (SHIM, csrc, *include_paths("cpu"))]
    ordered = []
    for source in sources:
        ordered += ["-x", "none" if source.suffix == ".o" else "c++", str(source)]
    command = [COMPILER, *_FLAGS, *flags, *includes, "-include", "shim.h", *ordered, "-o", str(output)]
    command += ["-lstdc++", "-lm"]  # which g++ leaves out after -x none
    if "-shared" in flags:
        command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return output


def operators(folder: Path) -> Path:
    """A shared library that implements the operators of the namespace cc_ds_shim on CPU tensors."""
    sources = [*(CSRC / "cuda" / name for name in KERNELS), SHIM / "binding.cpp"]
    return compile_to(folder / "shim.so", sources, ["-O1", "-fPIC", "-shared"])
