# Two commands do everything on a fresh machine with Python 3.11+: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers fill two cores: threads of numpy and PyTorch would wait for each other by spinning.
KEPT := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
LIGHTLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="$$($(BIN)/python tests/xla_flags.py lightly)"
WHOLE := XLA_FLAGS="$$($(BIN)/python tests/xla_flags.py whole)"

.PHONY: help setup run test lint clean

help:
	@echo "make run    set up, run the main job (scan and snap), say where the report is"
	@echo "make test   set up, run all tests"
	@echo "make setup  the set-up alone"
	@echo "make lint   set up, check style and types"
	@echo "make clean  remove the environment and build products (not runs/)"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed

run: setup
	$(BIN)/minitf scan-snap --out runs/scan-snap --overwrite

test: $(VENV)/installed-dev
	# Two workers, each with its own compiled programs. Compiling takes most of the time, so what a program
	# computes is tested with little optimization, and what XLA makes of it as users have it. Python's
	# bytecode is kept: seconds for each of many processes.
	$(KEPT) $(LIGHTLY) $(PYTEST) -m "not optimized"
	$(KEPT) $(WHOLE) $(PYTEST) -m optimized $$(grep -rl --include='test_*.py' mark.optimized tests)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
