# `make run` and `make test` are all a fresh machine needs: Python 3.11, make and a package registry.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
export GENEFORMER_HF_SHARED ?= $(abspath ../shared)

.DEFAULT_GOAL := help
.PHONY: help run test test-slow quality docs bench clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

# A stamp per set of requirements, so that a second call starts at once.
$(VENV)/.run: setup.cfg constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or call make PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing (a minute or two) ..."
	$(PIP) torch==2.13.0 -e '.[plot,evaluation]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing the test tools ..."
	$(PIP) torch==2.13.0 -e '.[dev]'
	@touch $@

run: $(VENV)/.run  ## install and run the demo: real cells, a tiny model, embeddings, pictures
	$(OFFLINE) $(BIN)/geneformer-hf demo --output demo_output --overwrite

test: $(VENV)/.dev  ## install and run the quick tests, offline
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/.dev  ## the slow tests: the whole demo, fresh processes, full-size checkpoints
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

quality: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev  ## the documentation as a site, in site/; warnings are errors
	$(OFFLINE) $(BIN)/python -m sphinx -W --keep-going -q -b html docs site

bench: $(VENV)/.dev  ## the benchmarks; each ends with JSON lines of its claims
	$(OFFLINE) $(BIN)/python benchmarks/bench_tokenize.py --memory
	$(OFFLINE) $(BIN)/python benchmarks/bench_stream.py
	$(OFFLINE) $(BIN)/python benchmarks/bench_embed.py
	$(OFFLINE) $(BIN)/python benchmarks/bench_pretrain.py
	$(OFFLINE) $(BIN)/python benchmarks/bench_finetune.py
	$(OFFLINE) $(BIN)/python benchmarks/bench_perturb.py
	$(OFFLINE) $(BIN)/python benchmarks/bench_screen.py
	$(OFFLINE) $(BIN)/python benchmarks/bench_onnx.py

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) site docs/_beside .pytest_cache .mypy_cache .ruff_cache demo_output *.egg-info
