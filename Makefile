# One word a target. Each makes the environment it needs when that is missing or out of date, and is quick when not.

PYTHON ?= python3
BIN := .venv/bin
EDGE := .venv-edge/bin
INSTALL = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help install demo test check test-edge test-runtimes test-arm cov soak fuzz bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: .venv/ready  ## the three commands, in .venv/bin

demo: .venv/ready  ## train, export and serve ten devices, kill two, draw a page of it: runs/demo-fleet/report.html
	$(BIN)/python examples/demo

test: .venv/ready  ## every test
	$(BIN)/python -m pytest

check: .venv/ready  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-edge: .venv-edge/ready  ## the device's tests, with what a device has and no torch
	$(EDGE)/python -c "import importlib.util as u; assert not (u.find_spec('torch') or u.find_spec('onnx'))"
	$(EDGE)/python -m pytest tests/edge tests/test_golden.py --fuzz-examples 50000

test-runtimes: .venv/ready  ## bundles on the onnxruntimes that boards have; RUNTIMES="1.15.1 newest" for some
	$(BIN)/python tests/rigs/runtimes.py $(RUNTIMES)

test-arm: .venv/ready  ## the device on an emulated Raspberry Pi, and with 512 MB: as root, about 15 minutes
	$(BIN)/python tests/rigs/arm.py

cov: .venv/ready  ## branch coverage of nmoe_edge, with its floor
	$(BIN)/python -m pytest tests/edge tests/test_golden.py --fuzz-examples 2000 --cov --cov-report term

soak: .venv/ready  ## processes killed, frozen, overloaded and lied to, at length: about four minutes
	$(BIN)/python tests/rigs/soak.py

fuzz: .venv/ready  ## ten million hostile messages, other ones each time: about two hours
	$(BIN)/python -m pytest tests/edge/test_wire_fuzz.py --fuzz-examples 5000000 --fuzz-random

bench: .venv/ready  ## what a message, an exchange, a remote expert and a round of training cost
	$(BIN)/python tests/bench/wire.py
	$(BIN)/python tests/bench/serving.py
	$(BIN)/python tests/bench/training.py

clean:  ## remove the environments and everything that was built
	rm -rf .venv .venv-edge .venv-runtimes build dist runs/demo-fleet *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) '.[all,dev]'
	@touch $@

.venv-edge/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-edge
	$(EDGE)/python $(INSTALL) '.[edge,test]'
	@touch $@
