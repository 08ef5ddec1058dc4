# What CONTRIBUTING.md tells, as commands. Everything lives in .venv; `make setup` is implied.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test quick lint bench conformance clean

setup: .venv/ready

# llama-cpp-python compiles from source here: about 5 minutes on two cores, needs a C++ compiler and cmake.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch .venv/ready

test: setup
	$(BIN)/python -m pytest

quick: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Peers that are not installed (extra [bench]) are left out. Random files of the real sizes come into build/bench, 7 GB.
bench: setup
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/vision.py --json build/bench/results/vision.json
	$(BIN)/python benchmarks/report.py build/bench/results/vision.json

# The yardstick lies beside the checkout where it is at hand.
conformance: setup
	$(BIN)/python ../shared/conformance/check.py tests/conformance_adapter.py ../shared/reference/fixtures --path exact
	$(BIN)/python ../shared/conformance/check.py tests/conformance_adapter.py ../shared/reference/fixtures --path quant

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
