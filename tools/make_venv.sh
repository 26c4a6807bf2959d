#!/usr/bin/env bash
# Makes a virtual environment with everything cc_ds needs, and builds its extension:
#     PYTHON=python3.11 bash tools/make_venv.sh .venv
# torch is its CPU build, or its CUDA build where a GPU is seen; TORCH, what pip is to install, comes first. With CUDA, on
# a login node without a GPU:
#     TORCH=torch===2.13.0 bash tools/make_venv.sh .venv       (pip takes 2.13.0+cpu for ==2.13.0, but not for ===)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
torch=2.13.0

python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $python is older than Python 3.10; name a newer one: make PYTHON=/path/to/python3" >&2
    exit 1
}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

if [ -n "${TORCH:-}" ]; then
    echo "Installing $TORCH, as TORCH says"
    # shellcheck disable=SC2086
    install $TORCH   # may have options of pip's with it
elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "A GPU is seen: installing torch $torch with CUDA"
    install "torch===$torch"
elif [ "$(uname -s)" = Linux ]; then
    echo "No GPU is seen: installing torch $torch for the CPU (TORCH=torch===$torch: with CUDA)"
    # From where pip looks anyway, if the CPU build is there; else from PyTorch's own index.
    install "torch==$torch+cpu" 2>/dev/null ||
        install "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
else
    install "torch==$torch"
fi
echo "Installing the other packages, and building the extension"
install setuptools wheel ninja
# DeepSpeed's setup.py, which compiles nothing, would give up where there is a GPU but no nvcc.
DS_IGNORE_CUDA_DETECTION=1 install --no-build-isolation --editable ".[dev]"
