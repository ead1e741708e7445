# Sets up, shows and checks rcllm. `make` alone says what there is; `make setup VENV=somewhere` uses another environment.
# What pip says goes to a log, which is shown where a step fails.
VENV ?= .venv
PYTHON ?= python3
bin := $(VENV)/bin
ready := $(VENV)/.rcllm-ready
log := .cache/setup.log
step := scripts/step $(log)

.DEFAULT_GOAL := help
.PHONY: help setup demo test check

help:
	@echo 'make demo    real films, real viewers: what each reuse level costs and keeps on this machine'
	@echo 'make test    the tests that take seconds; $(bin)/python -m pytest -m slow runs the others'
	@echo 'make check   format, lint, types, import contracts, lines of code'
	@echo 'make setup   an environment in $(VENV) with rcllm and what it is developed with; the others call it'

setup: $(ready)

# torch comes first and alone: some indexes also carry builds for accelerators, which a joint resolution may prefer
$(ready): pyproject.toml $(wildcard constraints.txt)
	@test -x $(bin)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'rcllm needs Python 3.11 or later. Name one: make setup PYTHON=python3.12'; exit 1; }
	@echo 'Setting up rcllm in $(VENV), once: 2 to 10 minutes, 3 GB on disk.'
	@rm -f $(log)
	@test -x $(bin)/python || $(step) '1/3 an environment (seconds)' $(PYTHON) -m venv $(VENV)
	@$(bin)/python -c 'import torch' 2>/dev/null || \
		$(step) '2/3 torch (a download of 200 MB or more: minutes)' $(bin)/python -m pip install torch==2.13.0
	@$(step) '3/3 rcllm and what it is developed with (300 MB: minutes)' \
		$(bin)/python -m pip install -e '.[dev]' $(if $(wildcard constraints.txt),-c constraints.txt)
	@touch $@

demo:
	@echo 'A demo of rcllm: sets it up (the first time: minutes), fetches a small model and film ratings, and ranks.'
	@$(MAKE) --no-print-directory setup
	@$(bin)/rcllm demo

test: setup
	@echo 'Running the tests: some minutes on 2 cores, a dot for each.'
	@$(bin)/python -m pytest

check: setup
	@PYTHON=$(abspath $(bin)/python) scripts/check
