"""The CUDA source as a program under a sanitizer, and planted bugs for it to find."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from ops.cuda_shim.build import CSRC, KERNELS, SHIM, compile_to
from ops.samples import ROUNDING, SUMS, Sample, expected

CASES = [
    Sample(batch=2, positions=3, layers=5, hidden=37, mask="some"),
    Sample(batch=2, positions=3, layers=5, hidden=40, hard=False),
    Sample(batch=3, positions=2, layers=9, hidden=64, dtype=torch.bfloat16),
    Sample(batch=2, positions=2, layers=3, hidden=12, layout="unaligned"),
    Sample(batch=2, positions=2, layers=3, hidden=12, layout="transposed", numbers="tied"),
    Sample(batch=2, positions=2, layers=2, hidden=1030, hard=False),  # several blocks along H in every kernel
    Sample(batch=2, positions=1, layers=40, hidden=4),  # layers past a warp
    Sample(batch=5, positions=1, layers=5, hidden=4),  # several rounds of examples in the weight's gradient
]
SHARED = ("gate.h", "cuda/common.cuh")
# Threads are dear: those with few blocks, and what only shows between rounds.
CASES_FOR_THREADS = [CASES[i] for i in (0, 1, 6, 7)]


@dataclass(frozen=True)
class Tool:
    """How to build and run the program."""

    name: str
    flags: tuple[str, ...]
    cases: list[Sample]
    environment: dict[str, str]


FIBERS = Tool(
    "fibers, address and undefined-behaviour sanitizers",
    ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    CASES,
    {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"},
)
THREADS = Tool(
    "threads, thread sanitizer",
    ("-O1", "-fsanitize=thread", "-DSHIM_THREADS", "-pthread"),
    CASES_FOR_THREADS,
    {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
)


def write_cases(path: Path, samples: list[Sample]) -> None:
    """In the format that check.cpp reads."""
    with path.open("wb") as file:

        def integer(*values: int) -> None:
            file.write(struct.pack(f"<{len(values)}q", *values))

        def text(value: str) -> None:
            integer(len(value))
            file.write(value.encode())

        integer(len(samples))
        for sample in samples:
            text(sample.name)
            text(str(sample.dtype).removeprefix("torch."))
            integer(sample.hard, sample.layers, sample.batch, sample.positions, sample.hidden)
            truth = expected(sample)
            absolute = SUMS[sample.dtype] * max(1.0, *(value.abs().max().item() for value in truth.named().values()))
            file.write(struct.pack("<3d", sample.temperature, 1.001 * ROUNDING[sample.dtype] + 1e-6, absolute))
            tensors = _tensors(sample, truth)
            integer(len(tensors))
            for name, tensor in tensors.items():
                text(name)
                extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
                misalignment = (
                    tensor.element_size() if sample.layout == "unaligned" and tensor.dtype == sample.dtype else 0
                )
                flat = tensor.as_strided((extent,), (1,)).contiguous()
                integer(tensor.dim(), *tensor.stride(), misalignment, extent * tensor.element_size())
                file.write(flat.view(torch.uint8).numpy().tobytes())


def _tensors(sample: Sample, truth) -> dict[str, torch.Tensor]:
    inputs = {name: value for name, value in sample.inputs().items() if torch.is_tensor(value)}
    for name in ("english", "embedding", "weight"):  # as binding.h gives them to the kernels
        inputs[name] = inputs[name] if inputs[name].stride(-1) == 1 else inputs[name].contiguous()
    grad_fused, grad_logits = sample.incoming()
    gradients = {f"expected grad_{name}": grad for name, grad in truth.gradients.items() if name != "ffn_output"}
    outputs = {f"expected {name}": getattr(truth, name) for name in ("fused", "choice", "logits")}
    right = {name: value.contiguous() for name, value in {**outputs, **gradients}.items()}
    return {**inputs, "grad_fused": grad_fused, "grad_logits": grad_logits, **right}


@dataclass(frozen=True)
class Mutant:
    """A planted bug: text of a source file (under csrc) replaced once."""

    name: str
    old: str
    new: str
    file: str

    def apply(self, folder: Path) -> None:
        """Change the file under `folder`, a copy of csrc."""
        source = folder / self.file
        text = source.read_text()
        assert text.count(self.old) == 1, f"{self.name}: its text occurs {text.count(self.old)} times in {self.file}"
        source.write_text(text.replace(self.old, self.new))


def compile_parts(folder: Path, tool: Tool, mutant: Mutant | None = None) -> dict[str, Path]:
    """The program's object files by source; of a mutant, those alone that it changes.

    In float32 and bfloat16 alone, to compile faster; and with rounds of two examples, so that small cases have several.
    """
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    for kernels in (csrc / "cuda" / name for name in KERNELS):
        text = kernels.read_text()
        for dtype in ("double", "c10::Half"):
            text = text.replace(f"CC_INSTANTIATE({dtype});\n", "")
        kernels.write_text(text.replace("kWeightExamples = 32", "kWeightExamples = 2"))
    assert "kWeightExamples = 2;" in (csrc / "cuda" / "backward.cu").read_text()
    sources = {name: csrc / "cuda" / name for name in KERNELS}
    if mutant is None:
        sources["check.cpp"] = SHIM / "check.cpp"
    else:
        mutant.apply(csrc)
        sources = {name: path for name, path in sources.items() if mutant.file in (f"cuda/{name}", *SHARED)}
    return {name: compile_to(folder / f"{name}.o", [path], [*tool.flags, "-c"], csrc) for name, path in sources.items()}


def link(folder: Path, tool: Tool, parts: dict[str, Path]) -> Path:
    """The program."""
    return compile_to(folder / "check", list(parts.values()), list(tool.flags))


def run(program: Path, tool: Tool, cases: Path, seconds: float = 300) -> str | None:
    """None where all is well (fibers: in two random orders); else what was found, in a few words."""
    for seed in (1, 2) if tool is FIBERS else (1,):
        finding = _run_once(program, tool, cases, seconds, seed)
        if finding is not None:
            return finding
    return None


def _run_once(program: Path, tool: Tool, cases: Path, seconds: float, seed: int) -> str | None:
    command = [str(program), str(cases)]
    if shutil.which("setarch"):  # the thread sanitizer does not cope with every randomised address space
        command = ["setarch", "-R", *command]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **tool.environment, "SHIM_SEED": str(seed)},
        )
    except subprocess.TimeoutExpired:
        return f"hangs for more than {seconds:.0f} s"
    if done.returncode == 0:
        return None
    telling = [
        line
        for line in done.stderr.splitlines()
        if any(w in line for w in ("WRONG", "cuda_shim", "ERROR", "WARNING: ThreadSanitizer", "runtime error"))
    ]
    return telling[0] if telling else f"exit status {done.returncode}: {done.stderr[-300:]}"
