# `make demo` and `make test` set up everything they need. PYTHON chooses the interpreter the environments are made with.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
LEGACY_VENV ?= .venv-legacy
LLAMA_VENV ?= .venv-llama
BIN := $(VENV)/bin
DEMO := .demo
# Processes that share the tests, a file's in one: one more than two cores, as tests wait for servers. More threads in each would only wait for each other.
WORKERS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test unit vllm lint docs clean

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --group dev --editable ".[parquet,gguf]"
	touch $@

$(VLLM_VENV)/.stamp: tests/vllm/make_environment.sh
	PYTHON=$(PYTHON) sh tests/vllm/make_environment.sh $(VLLM_VENV)
	touch $@

$(LEGACY_VENV)/.stamp: quant/backends/environment.py | $(VENV)/.stamp
	$(BIN)/python -m quant.backends.environment auto-gptq autoawq $(LEGACY_VENV)
	touch $@

$(LLAMA_VENV)/.stamp: tests/gguf/make_environment.sh tests/gguf/older_libc.py
	PYTHON=$(PYTHON) sh tests/gguf/make_environment.sh $(LLAMA_VENV) || echo "no llama.cpp for this machine: its tests are skipped, and say so" >&2
	mkdir -p $(LLAMA_VENV) && touch $@

demo: $(VENV)/.stamp
	rm -rf $(DEMO)
	$(BIN)/quant quantize --model-path examples/tinylm-4m --output-path $(DEMO)/tinylm-4m-w4a16 --method gptq --samples 64 --sequence-length 512
	$(BIN)/quant verify $(DEMO)/tinylm-4m-w4a16 --source examples/tinylm-4m
	$(BIN)/quant evaluate $(DEMO)/tinylm-4m-w4a16 --against examples/tinylm-4m --chunks 40
	$(BIN)/quant inspect $(DEMO)/tinylm-4m-w4a16

test: $(VENV)/.stamp $(VLLM_VENV)/.stamp $(LEGACY_VENV)/.stamp $(LLAMA_VENV)/.stamp
	QUANT_LLAMA_PYTHON=$(abspath $(LLAMA_VENV)/bin/python) QUANT_VLLM_PYTHON=$(abspath $(VLLM_VENV)/bin/python) QUANT_LEGACY_PYTHON=$(abspath $(LEGACY_VENV)/bin/python) $(PYTEST)

unit: $(VENV)/.stamp
	$(PYTEST) -m "not vllm"

vllm: $(VENV)/.stamp $(VLLM_VENV)/.stamp
	QUANT_VLLM_PYTHON=$(abspath $(VLLM_VENV)/bin/python) $(BIN)/python -m pytest tests/vllm

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_reference.py --check
	$(BIN)/python docs/make_models.py --check

docs: $(VENV)/.stamp
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/make_models.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LEGACY_VENV) $(LLAMA_VENV) $(DEMO) build dist *.egg-info
