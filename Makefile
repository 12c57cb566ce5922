# Two commands for a first-time user: `make demo` and `make test`. Both set themselves up in .venv.
# Any Python from 3.11 on will do: make demo PYTHON=python3.12
# A particular build of torch, for instance a CPU one: make demo TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch>=2.7
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
JOBS ?= auto

.PHONY: demo test lint bench-metaworld clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, steer the embedded base to success, leave $(OUT)/"
	@echo "make test   set up, run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench-metaworld   the README's table again (about two hours on two cores)"

$(VENV)/ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dsrl-vla: expected Python 3.11 or newer, got $$($(PYTHON) --version). Set PYTHON=<a newer python>."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps openpi-client==0.1.2 openpi-server==0.1.0  # they pin numpy < 2, needlessly
	touch $@

demo: $(VENV)/ready
	$(BIN)/dsrl-vla train demo --out $(OUT) $(if $(wildcard $(OUT)/recipe.yaml),--resume)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/ready
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/ruff format --config .ci/ruff.toml --check .
	$(BIN)/mypy

bench-metaworld: $(VENV)/ready
	$(BIN)/python benchmarks/steer_metaworld.py

clean:
	rm -rf $(VENV) build *.egg-info
