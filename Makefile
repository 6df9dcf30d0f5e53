# One command for each habit; CONTRIBUTING.md says when.
PYTHON ?= .venv/bin/python
ROWS ?= --help

.PHONY: fast all lint format cover bench

fast:   ## unit, property and simulation tests: no root, under a minute
	$(PYTHON) -m pytest tests/core tests/leasing tests/simulation tests/adapters/http tests/test_layers.py tests/test_wording.py tests/test_config.py

all:    ## every test
	$(PYTHON) -m pytest

lint:   ## formatting, lint, types
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

cover:  ## coverage, spawned daemons included
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest tests
	$(PYTHON) -m coverage combine
	$(PYTHON) -m coverage report

bench:  ## make bench ROWS="grants lookup"
	$(PYTHON) -m tests.bench $(ROWS)
