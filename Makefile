PYTHON ?= python

.PHONY: check format test test-slow test-long bench

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest -m "not slow"

test-slow:
	$(PYTHON) -m pytest -m "slow and not measuring and not long"
	$(PYTHON) -m pytest -n 0 -m "slow and measuring and not long"

test-long:
	$(PYTHON) -m pytest -m "long and not measuring"
	$(PYTHON) -m pytest -n 0 -m "long and measuring"

bench:
	$(PYTHON) experiments/allocation/scale.py
	$(PYTHON) experiments/tracing/speed.py
	$(PYTHON) experiments/benchmarks/building.py
	$(PYTHON) experiments/benchmarks/sweeps.py
	$(PYTHON) experiments/benchmarks/racing.py
	$(PYTHON) experiments/benchmarks/precision.py
	$(PYTHON) experiments/benchmarks/searches.py
	$(PYTHON) experiments/benchmarks/workers.py
	$(PYTHON) experiments/benchmarks/growth.py
