# make demo, make test, make lint: each makes .venv first and needs nothing but Python 3.11 or newer. make kernels does
# something where there is an nvcc.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.installed

.PHONY: demo test lint kernels bench clean

$(READY): pyproject.toml constraints.txt engine/_version.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "nybble needs Python 3.11 or newer, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/nybble demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

kernels: $(READY)
	$(BIN)/python .ci/kernels.py

bench: $(READY)
	$(BIN)/nybble bench transformers

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
