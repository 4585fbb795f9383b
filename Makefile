# The two commands of the README, and the installation that both share.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test faults install check

demo: install
	$(BIN)/megaarch compare configs/demo.yaml

test: install
	$(BIN)/python -m pytest tests -n 2 --dist loadgroup

# Runs that are killed at random and restarted; docs/parallelism.md.
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.distributed.fault_rounds --rounds 30

install: .venv/installed

.venv/installed: setup.py constraints.txt $(wildcard csrc/*.h csrc/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megaarch needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Style, as pre-commit runs it.
check: install
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
