# infsvc. `make run` opens the app, `make test` runs the tests; both install what is missing first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := .build/wheels
LLAMA_VERSION := 0.3.36
WORKER ?=

# llama.cpp is compiled for this machine: without OpenMP, whose threads spin beside other programs, and without AMX, which crashes
# with quantised weights (llama.cpp issue 20824).
NO_AMX := $(if $(filter x86_64 amd64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
CPU_ARGS := -DGGML_OPENMP=OFF $(if $(NO_AMX),-DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)')
GPU := $(shell if command -v nvcc >/dev/null && command -v nvidia-smi >/dev/null; then echo cuda; elif [ "$$(uname -s)" = Darwin ]; then echo metal; else echo cpu; fi)
ARGS_cpu := $(CPU_ARGS)
ARGS_cuda := $(CPU_ARGS) -DGGML_CUDA=ON
ARGS_metal := $(CPU_ARGS) -DGGML_METAL=ON
LLAMA := $(BIN)/.llama-$(LLAMA_VERSION)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run serve test check format bench llama-server demo-model start stop status list-workers build-llama build-llama-cpu build-llama-cuda build-llama-metal wheel wheel-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

run: $(BIN)/.node ## install what is missing and open the app
	@$(BIN)/infsvc-tui $(WORKER)

serve: $(BIN)/.node ## the same node without a screen
	@$(BIN)/infsvc serve $(WORKER)

test: $(BIN)/.dev ## install what is missing and run the tests
	@$(BIN)/python -m pytest -q

check: $(BIN)/.dev ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

start: $(BIN)/.node ## load WORKER=name: in the running node, or in a new one in the background
	@test -n "$(WORKER)" || { echo "make start WORKER=name; there are:"; ls envs | sed -n 's/^worker\.\(.*\)\.env$$/  \1/p'; exit 2; }
	@$(BIN)/infsvc start $(WORKER)

stop: $(BIN)/.node ## unload WORKER=name, or end the node
	@$(BIN)/infsvc stop $(WORKER)

status: $(BIN)/.node ## what runs, once
	@$(BIN)/infsvc status

list-workers: ## the worker files
	@ls envs | sed -n 's/^worker\.\(.*\)\.env$$/\1/p'

bench: $(BIN)/.dev ## measure: beside llama-server (built by `make llama-server`), and the screen's cost; about 30 minutes
	@LLAMA_SERVER=$${LLAMA_SERVER:-$(wildcard .build/llama-server)} $(BIN)/python -m tests.benchmarks.throughput
	@$(BIN)/python -m tests.benchmarks.screen_cost

llama-server: $(BIN)/.venv ## build llama-server, the peer of `make bench`, from the same source package (6 minutes)
	@PYTHON=$(BIN)/python bash tools/build_llama_server.sh $(LLAMA_VERSION) "$(ARGS_$(GPU))" $(CURDIR)/.build/llama-server

demo-model: $(BIN)/.train ## train the demo model anew from its corpus (within an hour on two quiet cores)
	@$(BIN)/python data/models/demo/train.py

build-llama: build-llama-$(GPU) ## compile llama.cpp for this machine's GPU or CPU

build-llama-cpu build-llama-cuda build-llama-metal: build-llama-%: $(BIN)/.venv ## compile llama.cpp for that
	mkdir -p $(WHEELS)
	CMAKE_ARGS="$(ARGS_$*)" $(BIN)/pip wheel -q --no-cache-dir --no-deps --wheel-dir $(WHEELS) llama-cpp-python==$(LLAMA_VERSION)
	$(BIN)/pip install -q --force-reinstall --no-deps $(WHEELS)/llama_cpp_python-$(LLAMA_VERSION)-*.whl
	@touch $(LLAMA)

wheel: $(BIN)/.dev ## build the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	@ls dist

wheel-check: wheel ## install the wheel alone and run it from a folder that holds a folder named engine
	@PYTHON=$(PYTHON) bash tools/wheel_check.sh

clean: ## remove the venv and what was built
	rm -rf $(VENV) .build dist

$(BIN)/.venv:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The wheel is kept in .build, so that a new venv does not compile again.
$(LLAMA): | $(BIN)/.venv
	@if ls $(WHEELS)/llama_cpp_python-$(LLAMA_VERSION)-*.whl >/dev/null 2>&1; then \
		$(BIN)/pip install -q --no-deps $(WHEELS)/llama_cpp_python-$(LLAMA_VERSION)-*.whl && touch $@; \
	else \
		echo "compiling llama.cpp for this machine ($(GPU)); about 4 minutes on 2 cores, once"; \
		$(MAKE) --no-print-directory build-llama-$(GPU); \
	fi

$(BIN)/.node: pyproject.toml constraints.txt | $(BIN)/.venv $(LLAMA)
	$(BIN)/pip install -q -c constraints.txt -e '.[node]'
	@touch $@

$(BIN)/.dev: $(BIN)/.node
	$(BIN)/pip install -q -c constraints.txt -e '.[node,dev]'
	@touch $@

$(BIN)/.train: $(BIN)/.dev
	$(BIN)/pip install -q -c constraints.txt -e '.[train]'
	@touch $@
