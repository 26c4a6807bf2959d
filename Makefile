# make demo     the whole walk on an embedded task (SEEDS=3 for its spread)
# make test     the tests
# make test-slow   the kernels under sanitizers, with planted bugs, and what happens under faults
# make kernels     the CUDA kernels without a GPU: what nvcc makes of them, against a budget; sanitizers; planted bugs
# make test-gpu    the CUDA kernels, where there is a GPU
# make test-slurm  the job scripts on a SLURM of two nodes, booted here (root; installs slurm-wlm by apt)
# make lint     formatting and lint
# Each makes .venv first; nothing else is needed but Python 3.10 or newer.

PYTHON ?= python3.11
SEEDS ?= 1
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow kernels test-gpu test-slurm lint clean

demo: $(VENV)/.ready
	$(RUN) tools/demo.py --output demo_output --seeds $(SEEDS)

test: $(VENV)/.ready
	$(RUN) -m pytest

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow

# without nvcc or g++ it says what was left out, and succeeds
kernels: $(VENV)/.ready
	$(RUN) -m pytest -m "slow or not slow" -rs tests/ops/test_cuda_budget.py tests/ops/test_sanitizers.py

test-gpu: $(VENV)/.ready
	$(RUN) -m pytest -m gpu tests/ops/test_gpu.py

test-slurm: $(VENV)/.ready
	bash tests/slurm/install.sh
	$(RUN) -m pytest -m slurm tests/slurm -rsP

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.ready: tools/make_venv.sh setup.py pyproject.toml $(shell find cc_ds/ops/csrc -type f 2>/dev/null)
	PYTHON=$(PYTHON) bash tools/make_venv.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build demo_output *.egg-info
