# Entry points for users and developers; `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
# Test processes that run side by side; each loads torch.
JOBS ?= 2
# More arguments for pytest, such as PYTEST_ARGS="-k ledger".
PYTEST_ARGS ?=
# An extra package index for torch, such as https://download.pytorch.org/whl/cpu for a machine without a GPU.
TORCH_INDEX ?=
# What `make screenshots` takes its pictures of.
RUN ?= runs/quickstart/full
PIPELINE ?= runs/quickstart
SWEEP ?= runs/sweeps/quickstart

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt

export TOKENIZERS_PARALLELISM := false
# Threads that wait for each other sleep instead of spinning: with anything else running, spinning is many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test test-full bench lint format docs screenshots clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the tested versions and this package in editable mode

train: install ## Build a tiny model and train it through every stage on this machine
	$(BIN)/theworld-train tiny runs/tiny
	$(BIN)/theworld-train run configs/pipelines/quickstart.yaml

test: install ## Run the fast tests
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-full: install ## Run all tests, the slow ones too
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

bench: install ## Measure the step, the data pipeline and several processes on this machine
	$(BIN)/python benchmarks/$(if $(shell command -v nvidia-smi),gpu,step).py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/parallel.py

lint: install ## Check style, format, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## Mend style and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install ## Write docs/reference from the commands and config models
	$(BIN)/python docs/reference/generate.py

screenshots: install ## Take the pictures of docs/reports.md; needs Chromium and what the variables above name
	$(BIN)/python docs/screenshots.py --run $(RUN) --pipeline $(PIPELINE) --sweep $(SWEEP)

clean: ## Remove caches and build output; .venv and runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Side by side, test processes share the cores: one thread each is faster, and the same arithmetic everywhere.
test test-full: export OMP_NUM_THREADS ?= 1

# torch comes first and alone: pip's own configuration (or TORCH_INDEX) may offer a build for CPU only, and the second
# step then finds the requirement met.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { \
		echo "error: $(PYTHON) was not found; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
			"name another one: make PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@$(PYTHON) -m venv $(VENV) || { \
		echo "error: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu install python3-venv" >&2; \
		exit 1; }
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP_INSTALL) --editable ".[dev,adapters,deepspeed,plot,sweep,video,tensorboard,wandb]"
	@touch $@
