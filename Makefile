# The two commands of the README are `make demo` and `make test`; each does all its own set-up, and twice is harmless.
#   make demo [SIZE=small|large] [MODEL=NAME]    NAME: visualbert, lxmert, ...; `visling demo --help` lists the families
#                                  draw scenes, train a detector and a model, answer questions; leaves demo/SIZE, runs in demo/SIZE/MODEL
#   make test [WORKERS=2]          lint, types and tests (minutes), in so many worker processes of one thread each
#   make check-slow                what is too slow for every commit: slow tests, and the large demo, which must gain 25 points
#   make bench                     timings into benchmarks/results/
PYTHON ?= python3
VENV ?= .venv
SIZE ?= small
MODEL ?= visualbert
WORKERS ?= 2
OUT ?= demo/$(SIZE)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt

# OpenMP threads that spin make every other process crawl.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint format check-slow bench clean

demo: $(VENV)/.core
	$(BIN)/visling demo --size $(SIZE) --model $(MODEL) --out $(OUT)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not data"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -rs
	rm -rf demo/check-slow
	$(BIN)/visling demo --size large --out demo/check-slow --at-least 25

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/training_step.py --out benchmarks/results
	$(BIN)/python benchmarks/store.py --out benchmarks/results --threads 1
	$(BIN)/python benchmarks/startup.py --out benchmarks/results
	$(BIN)/python benchmarks/region_contrast.py --out benchmarks/results
	$(BIN)/python benchmarks/retrieval.py --out benchmarks/results
	$(BIN)/python benchmarks/conversion.py --out benchmarks/results
	$(BIN)/python benchmarks/extraction.py --out benchmarks/results

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "visling needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing visling and PyTorch into $(VENV) (once; about two minutes) ..."
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing visling with its development tools into $(VENV) (once; about three minutes) ..."
	$(INSTALL) -e '.[dev,formats,hf,log,wandb]'
	@touch $@
