# Every target first makes or updates the environment that it needs.

PYTHON ?= python3
BIN := .venv/bin
EDGE := .venv-edge/bin
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help install demo test check test-edge test-runtimes test-arm cov soak fuzz bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s  %s\n", $$1, $$2 }' Makefile

install: .venv/ready  ## install the three commands into .venv/bin

demo: .venv/ready  ## train, export and serve ten devices, kill two; results in runs/demo-fleet/report.html
	$(BIN)/python examples/demo

test: .venv/ready  ## run all tests
	$(BIN)/python -m pytest

check: .venv/ready  ## check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-edge: .venv-edge/ready  ## run the tests of nmoe_edge without torch and onnx, as on a device
	$(EDGE)/python -c "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('onnx'))"
	$(EDGE)/python -m pytest tests/edge tests/test_golden.py --fuzz-examples 50000

test-runtimes: .venv/ready  ## replay bundles on several onnxruntime versions; RUNTIMES="1.15.1 newest" selects some
	$(BIN)/python tests/rigs/runtimes.py $(RUNTIMES)

test-arm: .venv/ready  ## run a device on an emulated Raspberry Pi, and with 512 MB; needs root, about 15 minutes
	$(BIN)/python tests/rigs/arm.py

cov: .venv/ready  ## measure branch coverage of nmoe_edge; fails below the minimum
	$(BIN)/python -m pytest tests/edge tests/test_golden.py --fuzz-examples 2000 --cov --cov-report term

soak: .venv/ready  ## kill, freeze, overload and attack serving devices; about four minutes
	$(BIN)/python tests/rigs/soak.py

fuzz: .venv/ready  ## decode ten million random and mutated messages, new ones each time; about two hours
	$(BIN)/python -m pytest tests/edge/protocol/test_wire_fuzz.py --fuzz-examples 5000000 --fuzz-random

bench: .venv/ready  ## time a message, an exchange, a remote expert and a round of training
	$(BIN)/python tests/bench/wire.py
	$(BIN)/python tests/bench/serving.py
	$(BIN)/python tests/bench/training.py

clean:  ## remove the environments, build outputs and caches
	rm -rf .venv .venv-edge .venv-runtimes build dist runs/demo-fleet *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) '.[all,dev]'
	@touch $@

.venv-edge/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-edge
	$(EDGE)/python $(INSTALL) '.[edge,test]'
	@touch $@
