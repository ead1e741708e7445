# Sets up, shows and checks rcllm. `make` alone says what there is; `make setup VENV=somewhere` uses another environment.
VENV ?= .venv
PYTHON ?= python3
bin := $(VENV)/bin
ready := $(VENV)/.rcllm-ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test check

help:
	@echo 'make setup   an environment in $(VENV) with rcllm and what it is developed with (minutes; then free)'
	@echo 'make demo    real films, real viewers: what each reuse level costs and keeps on this machine'
	@echo 'make test    the tests that take seconds; $(bin)/python -m pytest -m slow runs the others'
	@echo 'make check   format, lint, types, import contracts'

setup: $(ready)

# torch comes first and alone: some indexes also carry builds for accelerators, which a joint resolution may prefer
$(ready): pyproject.toml $(wildcard constraints.txt)
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -c 'import torch' 2>/dev/null || $(bin)/python -m pip install torch==2.13.0
	$(bin)/python -m pip install -e '.[dev]' $(if $(wildcard constraints.txt),-c constraints.txt)
	@touch $@

demo: setup
	$(bin)/rcllm demo

test: setup
	$(bin)/python -m pytest

check: setup
	PYTHON=$(abspath $(bin)/python) scripts/check
