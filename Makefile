# The commands of the README and CONTRIBUTING.md, and the installation that they share.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo quick test check faults fake-cuda install

demo: install
	$(BIN)/megaarch compare configs/demo.yaml

# The order is that of tests/conftest.py, and a file with fixtures of its own goes to one worker.
test: install
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup --no-loadscope-reorder

# What starts no process, no server and no browser, in under three minutes on two idle cores.
quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not slow" -n 2 --dist loadgroup --no-loadscope-reorder

# Style, the floors of the package, types, and that every test file can be imported.
check: .venv/checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python
	@said=$$($(BIN)/python -m pytest tests --collect-only -qqq) || { echo "$$said"; exit 1; }

.venv/checks: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[check]'
	touch $@

# Runs that are killed at random and restarted; docs/parallelism.md.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.distributed.fault_rounds --rounds 30

# A training step of every preset on fake CUDA tensors, without a GPU, and our calls of attention libraries
# against their wheels; docs/account.md. It needs g++ and a CUDA build of torch (5 GB), which it puts into
# an environment of its own, and the wheels of these libraries without what they need to run.
CUDA_TORCH := 2.11.0
CUDA_BIN := .venv-cuda/bin
CUDA_LIBRARIES := 'flash-attn-4>=4.0.0b1' nvidia-cudnn-frontend

fake-cuda: .venv-cuda/installed-$(CUDA_TORCH) build/libcuda.so.1
	LD_PRELOAD=$(CURDIR)/build/libcuda.so.1 OMP_NUM_THREADS=1 \
	  $(CUDA_BIN)/python -m pytest tests/fake_cuda tests/attention/test_signatures.py --account build/account.json

.venv-cuda/installed-$(CUDA_TORCH): setup.py Makefile
	$(PYTHON) -m venv .venv-cuda
	$(CUDA_BIN)/python -m pip install --quiet --upgrade pip
	$(CUDA_BIN)/python -m pip install --quiet torch==$(CUDA_TORCH) --editable '.[float8]' pytest pytest-timeout hypothesis
	$(CUDA_BIN)/python -m pip install --quiet --no-deps $(CUDA_LIBRARIES)
	$(CUDA_BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None and "make fake-cuda: the package index gave torch $(CUDA_TORCH) without CUDA: use another (PIP_INDEX_URL), or another version (CUDA_TORCH=...)")'
	touch $@

build/libcuda.so.1: tests/fake_cuda/libcuda.cpp
	@command -v g++ >/dev/null || { echo "make fake-cuda: it needs g++, for the driver's stand-in"; exit 2; }
	mkdir -p build
	g++ -shared -fPIC -Wl,-soname,libcuda.so.1 -o $@ $<

install: .venv/installed

.venv/installed: setup.py constraints.txt $(wildcard csrc/*.h csrc/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megaarch needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
