# Two commands for a new user: `make quickstart` and `make test`. Both make the virtual environment `.venv` first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install quickstart test test-slow lint clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[train,app,test]'
	touch $@

quickstart: install
	$(RUN) scripts/quickstart.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: lint
	$(RUN) -m pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile

test-slow: install
	$(RUN) -m pytest -m slow

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
