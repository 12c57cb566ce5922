# Two commands for a first-time user: `make demo` and `make test`. Both set themselves up in .venv.
# Any Python from 3.11 on will do: make demo PYTHON=python3.12
# A particular build of torch, for instance a CPU one: make demo TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch>=2.7
# LeRobot's tests need Python 3.12 or newer and an environment of their own: make lerobot-env LEROBOT_PYTHON=python3.13
LEROBOT_PYTHON ?= python3.12
LEROBOT_VENV ?= .venv-lerobot
LEROBOT_PLUGIN := -e adapters/lerobot_policy_dsrl
VENV ?= .venv
BIN := $(VENV)/bin
OPENPI_VENV ?= .venv-openpi
OPENPI_BIN := $(OPENPI_VENV)/bin
ROBOSUITE_VENV ?= .venv-robosuite
OUT ?= runs/demo
JOBS ?= auto

.PHONY: demo test lint bench bench-gpu bench-metaworld paper paper-robosuite lerobot-env test-lerobot openpi-env test-openpi clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, steer the embedded base to success, leave $(OUT)/"
	@echo "make test   set up, run the tests; LeRobot's and openpi's too, once their environments are there"
	@echo "make lerobot-env   set up $(LEROBOT_VENV) with LeRobot (Python 3.12 or newer, about 6 GB)"
	@echo "make lint   ruff and mypy"
	@echo "make openpi-env   an environment with openpi, in $(OPENPI_VENV) (2 GB)"
	@echo "make bench  measure speed and memory against their goals (about an hour; with a GPU, there too: make bench-gpu)"
	@echo "make bench-metaworld   the README's table again (about two hours on two cores)"
	@echo "make paper  the paper's Gym benchmark, three seeds of what is missing, and benchmarks/REPORT.md (about four hours)"
	@echo "make paper-robosuite   the same on robosuite's Lift, Can and Square, in $(ROBOSUITE_VENV) (what is missing may take a day)"

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
	@if [ -e $(LEROBOT_VENV)/ready ]; then $(MAKE) test-lerobot; fi
	@if [ -e $(OPENPI_VENV)/ready ]; then $(MAKE) test-openpi; fi

lerobot-env: $(LEROBOT_VENV)/ready

# uv resolves and fetches this one several times faster than pip, which stays as the second choice.
$(LEROBOT_VENV)/ready: setup.cfg pyproject.toml
	@$(LEROBOT_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "dsrl-vla: LeRobot needs Python 3.12 or newer. Set LEROBOT_PYTHON=<one>; 'uv python find 3.12' may know."; exit 2; }
	$(LEROBOT_PYTHON) -m venv $(LEROBOT_VENV)
	$(LEROBOT_VENV)/bin/python -m pip install --quiet --upgrade pip uv
	$(LEROBOT_VENV)/bin/uv pip install --quiet --python $(LEROBOT_VENV)/bin/python -e ".[lerobot-dev]" $(LEROBOT_PLUGIN) || \
	  $(LEROBOT_VENV)/bin/python -m pip install --quiet -e ".[lerobot-dev]" $(LEROBOT_PLUGIN)
	touch $@

test-lerobot: $(LEROBOT_VENV)/ready
	$(LEROBOT_VENV)/bin/python -m pytest -n $(JOBS) --disable-warnings tests/test_lerobot_*.py tests/test_robots.py tests/test_offline.py \
	  tests/test_pi0_processing.py
	$(LEROBOT_VENV)/bin/python -m pytest --disable-warnings tests/test_adapter_battery.py -k lerobot

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
	-$(BIN)/python benchmarks/bench_overlap.py
	-$(BIN)/python -m pip install --quiet -e ".[ray]" && $(BIN)/python benchmarks/bench_scaling.py
	-$(BIN)/python benchmarks/bench_demo.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $(MAKE) bench-gpu; fi
	$(BIN)/python benchmarks/report.py

bench-gpu: $(VENV)/ready
	-$(BIN)/python benchmarks/bench_gpu_learner.py
	-$(BIN)/python benchmarks/bench_gpu_pi0.py

# Runs that benchmarks/results/paper_gym.json holds are not repeated.
paper: $(VENV)/ready
	$(BIN)/python benchmarks/paper_gym.py
	$(BIN)/python benchmarks/paper_offline.py
	$(BIN)/python benchmarks/paper_report.py

# robosuite holds numpy below 2: an environment of its own.
$(ROBOSUITE_VENV)/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(ROBOSUITE_VENV)
	$(ROBOSUITE_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(ROBOSUITE_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(ROBOSUITE_VENV)/bin/python -m pip install --quiet -e ".[robosuite,diffusion]"
	touch $@

paper-robosuite: $(ROBOSUITE_VENV)/ready $(VENV)/ready
	$(ROBOSUITE_VENV)/bin/python benchmarks/paper_robosuite.py
	$(BIN)/python benchmarks/paper_report.py

bench-metaworld: $(VENV)/ready
	$(BIN)/python benchmarks/steer_metaworld.py

# openpi and LeRobot exclude each other, and openpi excludes numpy 2: it gets an environment of its own.
# rlinf-openpi declares CUDA builds and LeRobot, hence --no-deps and a list of what it really imports.
$(OPENPI_VENV)/ready: setup.cfg pyproject.toml adapters/openpi/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "openpi-env: expected Python 3.11 or 3.12, got $$($(PYTHON) --version). Set PYTHON=<one of these>."; exit 2; }
	$(PYTHON) -m venv $(OPENPI_VENV)
	$(OPENPI_BIN)/python -m pip install --quiet --upgrade pip
	$(OPENPI_BIN)/python -m pip install --quiet "$(TORCH)"
	$(OPENPI_INSTALL) -r adapters/openpi/requirements.txt
	$(OPENPI_INSTALL) --no-deps rlinf-openpi==0.1.1 rlinf-transformer-openpi==4.53.2 -e .
	touch $@
OPENPI_INSTALL = $(if $(shell command -v uv),uv pip install --python $(OPENPI_BIN)/python,$(OPENPI_BIN)/python -m pip install) --quiet

openpi-env: $(OPENPI_VENV)/ready

test-openpi: $(OPENPI_VENV)/ready
	$(OPENPI_BIN)/python -m pytest --disable-warnings tests/test_openpi_*.py tests/test_adapter_battery.py

clean:
	rm -rf $(VENV) $(LEROBOT_VENV) $(OPENPI_VENV) $(ROBOSUITE_VENV) build *.egg-info
