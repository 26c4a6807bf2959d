# ruff: noqa: E501
"""The CUDA source under sanitizers, on the CPU: clean as it is, and every planted bug found."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ops.cuda_shim import build as shim
from ops.cuda_shim.sanitized import FIBERS, THREADS, Mutant, compile_parts, link, run, write_cases

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shim.COMPILER is None, reason=shim.NO_COMPILER)]

BARRIER = "  __syncthreads();\n"
MUTANTS = [
    Mutant("decide: no barrier before the groups' sums are read", f"{BARRIER}  for (int j = thread; j < tile;", "  for (int j = thread; j < tile;", "cuda/forward.cu"),
    Mutant("decide: no barrier before the decision is read", f"{BARRIER}  const int lane = thread % kWarp;\n  for", "  const int lane = thread % kWarp;\n  for", "cuda/forward.cu"),
    Mutant("decide: a group is left out", "(sums[2 * tile + j] + sums[3 * tile + j])", "sums[2 * tile + j]", "cuda/forward.cu"),
    Mutant("decide: shared memory past the row's end is not set", "    decision[j] = d;\n", "    if (h0 + j < f.hidden) decision[j] = d;\n", "cuda/forward.cu"),
    Mutant("decide: a row past the last layer is written", "      if (second < layers) out[second] = z1;", "      out[second] = z1;", "cuda/forward.cu"),
    Mutant("decide: too little shared memory", "(kGroups + 1) * kDecideTile<T> * sizeof(A)", "kGroups * kDecideTile<T> * sizeof(A)", "cuda/forward.cu"),
    Mutant("fuse: no barrier before the softmax", f"{BARRIER}  if (thread < kWarp) {{\n    const int best = warp", "  if (thread < kWarp) {\n    const int best = warp", "cuda/forward.cu"),
    Mutant("fuse: no barrier before the choice is read", f"{BARRIER}  const int best = *chosen;", "  const int best = *chosen;", "cuda/forward.cu"),
    Mutant("fuse: a thread returns before the barrier", f"{BARRIER}  const int best = *chosen;", f"  if (thread == 77) return;\n{BARRIER}  const int best = *chosen;", "cuda/forward.cu"),
    Mutant("fuse: depends on another block of the same launch", "    gate[l] = (z +", "    gate[l] = (f.logits[b * layers + l] +", "cuda/forward.cu"),
    Mutant("fuse: rows without English are not left alone", "if (!fuses || left <= 0) return;", "if (left <= 0) return;", "cuda/forward.cu"),
    Mutant("load: no guard at the row's end", "pack.x[i] = i < left ? p[i] : T(0.0f);", "pack.x[i] = p[i];", "cuda/common.cuh"),
    Mutant("16-byte accesses to unaligned rows", "bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;", "bool aligned = true;", "cuda/common.cuh"),
    Mutant("warp_sum: one round too few", "int offset = kWarp / 2; offset > 0; offset /= 2) value +=", "int offset = kWarp / 4; offset > 0; offset /= 2) value +=", "cuda/common.cuh"),
    Mutant("warp_sum in a branch that not all lanes take", "    const A total = warp_sum(sum[r]);\n    if (lane == 0 &&", "    const A total = lane < 16 ? warp_sum(sum[r]) : A(0);\n    if (lane == 0 &&", "cuda/backward.cu"),
    Mutant("grad_example: no barrier before the logits' gradients are read", f"grad_logits, threadIdx.x);\n{BARRIER}", "grad_logits, threadIdx.x);\n", "cuda/backward.cu"),
    Mutant("grad_weight: no barrier before they are read", f"      }}\n    }}\n  {BARRIER}    for (int e = 0;", "      }\n    }\n    for (int e = 0;", "cuda/backward.cu"),
    Mutant("grad_weight: no barrier before they are overwritten", "    __syncthreads();  // the previous examples' gradients have been read\n", "", "cuda/backward.cu"),
    Mutant("grad_weight: the warps share one scratch", "shared + warp * layers;", "shared;", "cuda/backward.cu"),
    Mutant("grad_weight: a row past the last layer is written", "out, l0 + r < layers ? left : 0);", "out, left);", "cuda/backward.cu"),
    Mutant("launch: the grid's dimensions are exchanged", "static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y)", "static_cast<unsigned>(blocks_y), static_cast<unsigned>(blocks_x)", "cuda/common.cuh"),
    Mutant("argmax: ties go to the last", "index < best_index);", "index > best_index);", "gate.h"),
    Mutant("softmax: its gradient without the inner product", "p * (grad_gate - inner) /", "p * grad_gate /", "gate.h"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Path]:
    """The file of cases for each tool."""
    folder = tmp_path_factory.mktemp("cases")
    for index, tool in enumerate((FIBERS, THREADS)):
        write_cases(folder / f"{index}.bin", tool.cases)
    return {tool.name: folder / f"{index}.bin" for index, tool in enumerate((FIBERS, THREADS))}


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """The object files without a planted bug for each tool."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda tool: compile_parts(tmp_path_factory.mktemp("clean"), tool), (FIBERS, THREADS))
    return dict(zip((FIBERS.name, THREADS.name), parts))


@pytest.mark.parametrize("tool", [FIBERS, THREADS], ids=["fibers", "threads"])
def test_clean(tool, cases, clean, tmp_path):
    assert run(link(tmp_path, tool, clean[tool.name]), tool, cases[tool.name]) is None


@pytest.fixture(scope="module")
def found(cases, clean, tmp_path_factory) -> dict[str, str | None]:
    """What was found of each mutant: by fibers, else by threads, else None."""

    def hunt(mutant: Mutant) -> str | None:
        for tool in (FIBERS, THREADS):
            folder = tmp_path_factory.mktemp("mutant")
            program = link(folder, tool, {**clean[tool.name], **compile_parts(folder, tool, mutant)})
            finding = run(program, tool, cases[tool.name], seconds=100)
            if finding is not None:
                return f"{tool.name}: {finding}"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip([mutant.name for mutant in MUTANTS], pool.map(hunt, MUTANTS)))


@pytest.mark.parametrize("name", [mutant.name for mutant in MUTANTS])
def test_planted_bug_is_found(name, found):
    print(found[name])
    assert found[name] is not None, "this bug survives every check"
