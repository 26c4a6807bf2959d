"""What the CUDA kernels cost on each architecture: registers, spills and shared memory, against cuda_budget.json.

python tests/ops/test_cuda_budget.py      # writes the file anew, from what nvcc says now
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).resolve().parent.parent.parent / "cc_ds" / "ops" / "csrc"
KERNELS = ("forward.cu", "backward.cu")
BUDGET = Path(__file__).with_name("cuda_budget.json")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def measure(folder: Path) -> dict[str, dict[str, int]]:
    """Compile the kernels for all architectures; {"decide float16 vector sm_90": {"registers": ...}, ...}."""
    with ThreadPoolExecutor() as pool:
        return {name: cost for part in pool.map(partial(_measure, folder), KERNELS) for name, cost in part.items()}


def _measure(folder: Path, kernels: str) -> dict[str, dict[str, int]]:
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    command = [
        NVCC, "-O3", "-std=c++20", "--threads=0", "-Xptxas=-v", *targets,
        *(f"-I{path}" for path in include_paths("cpu")),
        "-c", str(CSRC / "cuda" / kernels), "-o", str(folder / f"{kernels}.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entry = re.compile(
        r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers(?:, used \d+ barriers)?(?:, (\d+) bytes smem)?",
        re.DOTALL,
    )
    found = {}
    for mangled, architecture, stack, stores, loads, registers, shared in entry.findall(done.stderr):
        found[f"{_readable(mangled)} {architecture}"] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "static_shared": int(shared or 0),
        }
    return found


def _readable(mangled: str) -> str:
    kernel, dtype, vector = re.search(
        r"(decide|fuse|grad_gate|grad_inputs)I(N3c108BFloat16E|N3c104HalfE|f|d)Lb([01])E", mangled
    ).groups()
    names = {"f": "float32", "d": "float64", "N3c108BFloat16E": "bfloat16", "N3c104HalfE": "float16"}
    return f"{kernel} {names[dtype]} {'vector' if vector == '1' else 'scalar'}"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here to compile the CUDA kernels with")
def test_within_budget(tmp_path):
    budget, found = json.loads(BUDGET.read_text()), measure(tmp_path)
    assert found.keys() == budget["registers"].keys()
    assert not {name: cost for name, cost in found.items() if cost["spills"] or cost["stack"] or cost["static_shared"]}
    over = {
        name: f"{cost['registers']} registers, {budget['registers'][name]} allowed"
        for name, cost in found.items()
        if cost["registers"] > budget["registers"][name]
    }
    assert not over


def test_dynamic_shared_memory_fits_every_architecture():
    """The sums of the launches, at their largest: 48 KiB need no opt-in anywhere."""
    layers, wide = 1024, 8
    decide = 5 * 64 * 16 // 2 * 4  # bfloat16: 8 elements a thread, float32 sums
    fuse, grad_inputs = layers * wide + 4, (4 * layers + 32 * 4) * wide
    limit = json.loads(BUDGET.read_text())["dynamic_shared"]
    assert max(decide, fuse, grad_inputs) <= limit <= 48 * 1024


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(Path(folder))
    spare = 8  # another release of nvcc counts a little differently
    BUDGET.write_text(
        json.dumps(
            {
                "nvcc": subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout.split()[-1],
                "torch": torch.__version__.split("+")[0],
                "dynamic_shared": 34 * 1024,
                "registers": {name: cost["registers"] + spare for name, cost in sorted(costs.items())},
            },
            indent=1,
        )
        + "\n"
    )
    print(f"{len(costs)} kernels, {sum(c['spills'] for c in costs.values())} bytes spilled", file=sys.stderr)
