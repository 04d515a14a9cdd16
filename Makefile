# The interpreter that makes the virtual environment.
PYTHON ?= python3
# The detectron2 that is built where none is installed, and the versions of everything else.
DETECTRON2 ?= 0.6
CONSTRAINTS ?= constraints.txt

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/set-up-complete

.DEFAULT_GOAL := help
.PHONY: help set-up test quickstart tour lint format clean

help:
	@echo "make quickstart  set up, then train and evaluate a small GN+WS Mask R-CNN"
	@echo "make tour        set up, then run docs/tour.ipynb and keep its outputs"
	@echo "make test        set up, then run all tests"
	@echo "make lint        set up, then check style, formatting and types"
	@echo "make format      set up, then format the code"
	@echo "make set-up      install everything into $(VENV); does nothing when nothing changed"
	@echo "make clean       remove $(VENV), builds and caches"
	@echo "Another interpreter: make PYTHON=python3.12 test"

set-up: $(STAMP)

# The stamp is made last, so an interrupted set-up is completed by the next call.
$(STAMP): constraints.txt setup.py tools/install_detectron2.py $(wildcard tools/detectron2_patches/*)
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint $(CONSTRAINTS) torch torchvision setuptools wheel
	$(BIN)/python tools/install_detectron2.py --release $(DETECTRON2) --constraint $(CONSTRAINTS)
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev,export,fast-eval,lab,plots,slurm]'
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

quickstart: $(STAMP)
	$(BIN)/python tools/quickstart.py --resume

tour: $(STAMP)
	$(BIN)/jupyter execute --inplace docs/tour.ipynb

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
