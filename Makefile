# All targets run in a virtual environment, which is created if necessary.
#
#   make demo    train CartPole with RL Zoo's train command, then evaluate the agent with enjoy
#   make test    run the tests
#   make check   lint, formatting and types
#   make format  fix lint errors and format
#
# PYTHON  the interpreter that creates the environment
# VENV    folder of the environment
# TORCH   pip arguments that install PyTorch, e.g. for a CPU build: make test TORCH="torch --index-url <its index>"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch

BIN := $(VENV)/bin
SEED ?= 0
DEMO_FOLDER ?= logs/demo
DEMO := --algo scratch_dqn --env CartPole-v1 --seed $(SEED)

.PHONY: demo test check format

demo: $(VENV)/installed
	rm -rf $(DEMO_FOLDER)
	$(BIN)/python -m rl_zoo3.train $(DEMO) -f $(DEMO_FOLDER) --eval-freq 2500 --eval-episodes 20
	SDL_VIDEODRIVER=dummy $(BIN)/python -m rl_zoo3.enjoy $(DEMO) -f $(DEMO_FOLDER) --load-best --no-render -n 10000

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
