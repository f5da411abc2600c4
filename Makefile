# From a clean clone, with Python >= 3.11: `make demo`, `make test`, `make test-integrations`, `make check`,
# `make bench`, `make bench-faults`, `make docs`, `make proto`, `make sim`, `make fuzz`.
# Everything is installed into .venv, .venv-proto and .venv-integrations beside this file, and nowhere else.
PYTHON ?= python3
PYTEST_ARGS ?=
# Where the tests leave their results as JUnit XML, if anywhere.
RESULTS ?=
# Which ecosystems `make test-integrations` tries: all without a name.
ECOSYSTEMS ?=
SEEDS ?= 2000
MINUTES ?= 10
MESSAGES ?= 10000
BIN := .venv/bin
PROTO_BIN := .venv-proto/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
# Its output loads on protobuf 4.25 up to today's; newer tools write code that refuses older runtimes.
# It imports pkg_resources, which setuptools 81 dropped.
PROTO_TOOLS := grpcio-tools==1.60.1 'setuptools<81'
# What measures time runs alone, all else on two cores at once. 5: nothing was selected in this half.
PYTEST = f() { $(BIN)/python -m pytest $(if $(RESULTS),--junitxml=$(RESULTS)/$(1).xml) "$$@" $(PYTEST_ARGS) \
	|| [ $$? -eq 5 ]; }; f

.PHONY: demo test test-integrations check bench bench-faults proto docs mutants sim fuzz

demo: .venv/.demo
	$(BIN)/python examples/demo.py

test: .venv/.dev .venv-proto/.tools
	$(call PYTEST,two) --numprocesses 2 --dist loadscope --no-loadscope-reorder -m 'not alone'
	$(call PYTEST,alone) -m alone

test-integrations:
	$(PYTHON) -m tests.integrations $(if $(RESULTS),--results $(RESULTS)) $(ECOSYSTEMS)

check: .venv/.dev .venv-proto/.tools
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_tidy.py

bench: .venv/.dev
	$(BIN)/python -m tests.bench

bench-faults: .venv/.dev
	$(BIN)/python -m tests.bench.faults

docs: .venv/.dev
	$(BIN)/python docs/generate.py --plots

mutants: .venv/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt mutmut
	$(BIN)/python -m tests.mutants $(MUTANTS)

sim: .venv/.dev
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

fuzz: .venv/.dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --messages $(MESSAGES)

proto: .venv-proto/.tools
	$(PROTO_BIN)/python proto/generate.py

$(BIN)/python $(PROTO_BIN)/python:
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

# Two marks in one environment: the demo needs less than the tests.
.venv/.demo .venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing into .venv (some minutes the first time)'
	$(INSTALL) '.[$(patsubst .venv/.%,%,$@)]'
	@touch $@

.venv-proto/.tools: Makefile | $(PROTO_BIN)/python
	$(PROTO_BIN)/pip install --quiet --disable-pip-version-check $(PROTO_TOOLS)
	@touch $@
