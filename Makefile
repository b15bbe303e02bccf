# Two commands from a fresh machine: `make demo` and `make test`. Both make their environment first.
PYTHON ?= python3
VENV ?= .venv
PINS ?=
RUN = $(VENV)/bin/python

.PHONY: demo question test check accelerator-check format clean

$(VENV)/run: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable . $(PINS)
	touch $@

$(VENV)/test: $(VENV)/run
	$(RUN) -m pip install --quiet --editable '.[test]' $(PINS)
	touch $@

demo: $(VENV)/run
	$(RUN) scripts/demo.py

# The three networks of 2016 as they were asked about, and their diagnoses: one to two hours on 2 cores. What is cut short
# goes on with the same command; results that are there are not made again.
question: $(VENV)/run
	$(RUN) benchmarks/study/run.py --only=stock

test: $(VENV)/test check
	$(RUN) -m pytest

check: $(VENV)/test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

# For a machine with a GPU, in eight minutes: .venv needs jax's plugin for it, as by `pip install 'jax[cuda13]'`.
accelerator-check: $(VENV)/run
	$(RUN) benchmarks/accelerator_check.py

format: $(VENV)/test
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
