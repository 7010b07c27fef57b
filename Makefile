# `make help` lists the targets. PYTHON chooses the interpreter, VENV the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.fedrot-installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
SOURCES := $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help install demo test integration check format bench gpu clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: $(STAMP)  ## virtual environment in .venv with everything in it

demo: $(STAMP)  ## FedIT and FedRot-LoRA in three settings, a few minutes
	$(BIN)/fedrot compare --methods fedit,fedrot --seeds 3 --output runs/demo --resume

test: $(STAMP)  ## all tests, on all cores up to eight
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

integration: $(STAMP)  ## tests that start real deployments
	$(BIN)/pip install --quiet -c constraints.txt --group integration
	$(BIN)/python -m pytest -m "" tests/nvflare tests/flower

check: $(STAMP)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(STAMP)  ## rewrite sources the way `check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(STAMP)  ## the operators against plain PyTorch and the machine's limits, a while
	$(BIN)/fedrot bench --output benchmarks/results

gpu: $(STAMP)  ## check and measure the GPU kernels on the card at hand, under ten minutes
	$(BIN)/python -m benchmarks.gpu_suite

clean:  ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch first. Without an NVIDIA GPU the CPU build, by its version label where pip is set up to
# find that, else through uv, which knows where it is; plain PyPI would bring gigabytes of CUDA.
define INSTALL_TORCH
	if nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/pip install "torch==$(TORCH)"; \
	else \
	  $(BIN)/pip install "torch==$(TORCH)+cpu" 2>/dev/null \
	  || { $(BIN)/pip install --quiet uv && VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --torch-backend cpu "torch==$(TORCH)"; } \
	  || $(BIN)/pip install "torch==$(TORCH)"; \
	fi
endef

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' \
	  || { echo "fedrot needs Python 3.10-3.13; choose one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) \
	  || { echo "no virtual environments here: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -c 'import torch' 2>/dev/null || { $(INSTALL_TORCH); }
	$(BIN)/pip install --quiet -c constraints.txt --group dev --editable .
	@touch $@
