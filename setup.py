"""Builds the fused gate's kernels (cc_ds/ops/csrc) where it can; installs without them where it cannot.

    pip install --no-build-isolation -e .

Two shared libraries, on torch's stable ABI, so that one wheel serves every torch from 2.13 on:
    cc_ds/ops/_cpu    needs torch and a C++ compiler
    cc_ds/ops/_cuda   needs nvcc too, and no GPU; for sm_80, sm_90, sm_100 and, as PTX, what comes after
What is not built is said once, here; `cc_ds.ops.status()` says it again at run time, where the reference takes over.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

SOURCES = Path("cc_ds/ops/csrc")
DEFINES = ["-DTORCH_TARGET_VERSION=0x020d000000000000"]  # torch 2.13
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", *DEFINES]
NVCC_FLAGS = ["-O3", "--threads=0", "-Xptxas=-warn-spills", *DEFINES]
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def find_cuda_home() -> str | None:
    """The CUDA toolkit's folder, or None where there is no nvcc."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return home
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc itself knows where its toolkit lies, also behind a wrapper script
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.split("=", 1)[1].strip() for line in dry_run.splitlines() if line.startswith("#$ TOP=")]
    return str(Path(tops[0]).resolve()) if tops else None


def extensions() -> tuple[list, dict]:
    """(ext_modules, cmdclass) for setup(); both empty, with a word on why, where nothing can be built."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        print("cc_ds: torch is not importable here (build isolation?): installing without kernels", file=sys.stderr)
        return [], {}
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13):
        print(f"cc_ds: torch {torch.__version__} is older than 2.13: installing without kernels", file=sys.stderr)
        return [], {}
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        print("cc_ds: no C++ compiler: installing without kernels, on the reference", file=sys.stderr)
        return [], {}

    headers = sorted(str(path) for path in SOURCES.rglob("*.*h"))
    cpu = cpp_extension.CppExtension(
        "cc_ds.ops._cpu",
        sorted(str(path) for path in (SOURCES / "cpu").glob("*.cpp")),
        py_limited_api=True,
        depends=headers,
        extra_compile_args={"cxx": CXX_FLAGS},
    )
    modules = [cpu]
    cuda_home = find_cuda_home()
    if cuda_home is not None:
        # a CPU build of torch looks for no toolkit, and its CUDAExtension refuses to work
        cpp_extension.CUDA_HOME = cuda_home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        modules.append(
            cpp_extension.CppExtension(
                "cc_ds.ops._cuda",
                [str(SOURCES / "cuda" / name) for name in ("gated_fuse.cpp", "forward.cu", "backward.cu")],
                py_limited_api=True,
                depends=headers,
                include_dirs=[str(Path(cuda_home) / "include")],
                library_dirs=[str(Path(cuda_home) / "lib64")],
                libraries=["cudart_static", "rt", "dl", "pthread"],
                extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
            )
        )
    for module in modules:
        module.optional = True

    class BuildExtension(cpp_extension.BuildExtension):
        """As torch's, but what does not compile is left out: the reference stands in for it."""

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                print(f"cc_ds: {extension.name} did not build; installing without it: {error}", file=sys.stderr)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # a compiler or a toolkit that torch refuses
                print(f"cc_ds: torch refuses the compiler or the CUDA toolkit: {error}", file=sys.stderr)
                without_cuda = [extension for extension in self.extensions if extension.name.endswith("_cpu")]
                if len(without_cuda) < len(self.extensions):
                    self.extensions = without_cuda
                    self.build_extensions()

    return modules, {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
