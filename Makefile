# `make` alone explains itself. Two targets do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install kserve demo up test test-system check format proto clean

help: ## Show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(STAMP) ## Make .venv with everything that demo and test need
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt 'torch==2.13.0' 'numpy'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

kserve: .kserve/.installed ## KServe's client, in an environment of its own (it pins an older psutil), for its test
.kserve/.installed:
	$(PYTHON) -m venv .kserve
	.kserve/bin/python -m pip install --quiet 'kserve==0.21.0' 'grpcio==1.81.1'
	@touch $@

demo: install ## The whole story on this machine: train, guard, roll back, promote, swap under load
	$(BIN)/interlock demo

up: install ## Start all rooms and keep them running
	$(BIN)/interlock up

test: install ## All tests
	$(BIN)/python -m pytest

check: install ## Format, lint, types, import contracts, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python tools/genproto.py --check
	$(BIN)/python tools/genproto_oip.py --check
	$(BIN)/python tools/gendocs.py --check

format: install ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install ## Regenerate what is drawn from protos/ and from tables in the code
	$(BIN)/buf format -w
	$(BIN)/python tools/genproto.py
	$(BIN)/python tools/genproto_oip.py
	$(BIN)/python tools/gendocs.py

clean: ## Remove the environment, caches and state
	rm -rf $(VENV) .interlock .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
