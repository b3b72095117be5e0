# Each target makes the environment it needs. VENV=/path/to/venv uses another place.
VENV ?= .venv
PY := $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test test-slow quick lint wheel bench

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(PY) -m pip install -q -U pip
	$(PY) -m pip install -q -e '.[dev,serve]'
	touch $@

demo: setup
	$(VENV)/bin/pairmill demo

# Two test processes on two cores: one thread each.
test test-slow quick: export OMP_NUM_THREADS := 1

test: setup
	$(PY) -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: setup
	$(PY) -m pytest -m slow -n 2 --dist worksteal

quick: setup
	$(PY) -m pytest -m "not slow" -x -n 2

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

wheel: setup
	$(PY) -m build --wheel --outdir dist .

bench: setup
	$(PY) -m benchmarks
