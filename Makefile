# Two commands for a first-time user: `make demo` and `make test`. Both set themselves up in .venv.
# Any Python from 3.11 on will do: make demo PYTHON=python3.12
# A particular build of torch, for instance a CPU one: make demo TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch>=2.7
# LeRobot's tests need Python 3.12 or newer and an environment of their own: make lerobot-env LEROBOT_PYTHON=python3.13
LEROBOT_PYTHON ?= python3.12
LEROBOT_VENV ?= .venv-lerobot
LEROBOT_TESTS := tests/test_lerobot_*.py tests/test_adapter_battery.py -k lerobot
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
JOBS ?= auto

.PHONY: demo test lerobot-env test-lerobot lint bench-metaworld clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, steer the embedded base to success, leave $(OUT)/"
	@echo "make test   set up, run the tests; LeRobot's too, once make lerobot-env has been run"
	@echo "make lerobot-env   set up $(LEROBOT_VENV) with LeRobot (Python 3.12 or newer, about 6 GB)"
	@echo "make lint   ruff and mypy"
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
	@if [ -e $(LEROBOT_VENV)/ready ]; then $(MAKE) test-lerobot; fi

lerobot-env: $(LEROBOT_VENV)/ready

# uv resolves and fetches this one several times faster than pip, which stays as the second choice.
$(LEROBOT_VENV)/ready: setup.cfg pyproject.toml
	@$(LEROBOT_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "dsrl-vla: LeRobot needs Python 3.12 or newer. Set LEROBOT_PYTHON=<one>; 'uv python find 3.12' may know."; exit 2; }
	$(LEROBOT_PYTHON) -m venv $(LEROBOT_VENV)
	$(LEROBOT_VENV)/bin/python -m pip install --quiet --upgrade pip uv
	$(LEROBOT_VENV)/bin/uv pip install --quiet --python $(LEROBOT_VENV)/bin/python -e ".[lerobot-dev]" || \
	  $(LEROBOT_VENV)/bin/python -m pip install --quiet -e ".[lerobot-dev]"
	touch $@

test-lerobot: $(LEROBOT_VENV)/ready
	$(LEROBOT_VENV)/bin/python -m pytest $(LEROBOT_TESTS)

lint: $(VENV)/ready
	$(BIN)/ruff check --config .ci/ruff.toml .
	$(BIN)/ruff format --config .ci/ruff.toml --check .
	$(BIN)/mypy

bench-metaworld: $(VENV)/ready
	$(BIN)/python benchmarks/steer_metaworld.py

clean:
	rm -rf $(VENV) $(LEROBOT_VENV) build *.egg-info
