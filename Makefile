# make demo    trains a zoo and an encoder and writes a report
# make test    runs the tests that take a few minutes; make test-all runs all of them
# make lint    checks style, types and the import rule
# make env     creates .venv and installs into it; the others do it if need be
# make clean   removes .venv and caches
#
# PYTHON chooses the interpreter that .venv is made with: make env PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.PHONY: demo test test-all lint env clean

demo: $(READY)
	@$(BIN)/weightspace demo

test test-all: export OMP_NUM_THREADS = 1
test: $(READY)
	@$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	@$(BIN)/python -m pytest

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

env: $(READY)

# The stamp comes last, so that an installation that was interrupted is made again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"error: $(PYTHON) is Python {v[0]}.{v[1]}; weightspace needs 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "installing into .venv (some minutes the first time)"
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) install --constraint constraints.txt torch
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
