# Two commands for a first-time user: `make demo` and `make test`. Both set themselves up in .venv.
# Any Python from 3.11 on will do: make demo PYTHON=python3.12
# A particular build of torch, for instance a CPU one: make demo TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch>=2.7
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
JOBS ?= auto

.PHONY: demo test lint bench bench-metaworld clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, steer the embedded base to success, leave $(OUT)/"
	@echo "make test   set up, run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make bench  measure speed and memory against their goals (about an hour)"
	@echo "make bench-metaworld   the README's table again (about two hours on two cores)"

$(VENV)/ready: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dsrl-vla: expected Python 3.11 or newer, got $$($(PYTHON) --version). Set PYTHON=<a newer python>."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/dsrl-vla train demo --out $(OUT) $(if $(wildcard $(OUT)/recipe.yaml),--resume)

test: $(VENV)/ready
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/ready
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/ruff format --config .ci/ruff.toml --check .
	$(BIN)/mypy

# Each prints its figures against their goals and writes its JSON; a goal that is missed does not stop the others.
# LEROBOT=<a python 3.12 with lerobot> adds the comparison with LeRobot's replay buffer.
bench: $(VENV)/ready
	-$(BIN)/python benchmarks/bench_learner.py
	-$(BIN)/python benchmarks/update_cost.py
	-$(BIN)/python benchmarks/bench_prefix.py
	-$(BIN)/python benchmarks/bench_replay.py $(if $(LEROBOT),--lerobot $(LEROBOT))
	-$(BIN)/python benchmarks/bench_import.py
	-$(BIN)/python benchmarks/bench_memory.py
	-$(BIN)/python benchmarks/bench_demo.py
	$(BIN)/python benchmarks/report.py

bench-metaworld: $(VENV)/ready
	$(BIN)/python benchmarks/steer_metaworld.py

clean:
	rm -rf $(VENV) build *.egg-info
