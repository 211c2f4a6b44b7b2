# Two commands on a fresh machine with Python 3.11 or newer: make quickstart, make test.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
VENV := $(ROOT).venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test lint clean

help:
	@echo "make quickstart   install into .venv, run the four tiny steps on the CPU, show what came out"
	@echo "make test         install what the tests need and run all of them"
	@echo "make lint         ruff, pyright and the import contracts"

install: $(VENV)/.installed

$(VENV)/.installed: $(ROOT)pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '$(ROOT)'
	touch $@

$(VENV)/.installed-dev: $(ROOT)pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '$(ROOT)[dev]'
	touch $@

quickstart: export CUDA_VISIBLE_DEVICES =
quickstart: $(VENV)/.installed
	$(BIN)/nemotron steps run data_prep/sft_packing -c tiny
	$(BIN)/nemotron steps run convert/hf_to_megatron -c tiny
	$(BIN)/nemotron steps run peft/megatron_bridge -c tiny
	$(BIN)/nemotron steps run convert/merge_lora -c tiny
	$(BIN)/python -m nemotron.steps._tiny.show

# Two workers, since tests wait half of the time; a file is one worker's, so that what its tests
# share is made once. Without bytecode hundreds of processes would compile our sources again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(VENV)/.installed-dev
	cd '$(ROOT)' && $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	cd '$(ROOT)' && $(BIN)/ruff check . && $(BIN)/ruff format --check .
	cd '$(ROOT)' && $(BIN)/pyright && $(BIN)/lint-imports

clean:
	rm -rf output .nemotron
