# The two commands of the README are `make demo` and `make test`; each does all its own set-up, and twice is harmless.
#   make demo [SIZE=small|large] [MODEL=NAME]    NAME: visualbert, lxmert, ...; `visling demo --help` lists the families
#                                  draw scenes, train a detector and a model, answer questions; leaves demo/SIZE, runs in demo/SIZE/MODEL
#   make test [WORKERS=2]          lint, types and tests (minutes), in so many worker processes of one thread each
#   make check-slow                what is too slow for every commit: slow tests, and the large demo, which must gain 25 points
#   make bench [PRECISION=bf16] [AGAINST=DIR]    speed against other implementations, and one table of it beside the targets;
#                                  a quarter of an hour on two cores; AGAINST: an older checkout, for models of demo size
#   make bench-more                further timings: dense ViLBERT and VL-BERT, all families' retrieval, contrast, reading, detectors, serving
#   make bench-gpu                 all five models against their peers on one GPU, in less than eight minutes
PYTHON ?= python3
VENV ?= .venv
SIZE ?= small
MODEL ?= visualbert
WORKERS ?= 2
PRECISION ?= fp32
AGAINST ?=
OUT ?= demo/$(SIZE)
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt

# OpenMP threads that spin make every other process crawl.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint format check-slow bench bench-more bench-gpu clean

demo: $(VENV)/.core
	$(BIN)/visling demo --size $(SIZE) --model $(MODEL) --out $(OUT)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -rs -m "not slow and not gpu and not data"

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
	$(BIN)/python benchmarks/pretraining.py --out benchmarks/results --models lxmert --precision $(PRECISION)
	$(BIN)/python benchmarks/pretraining.py --out benchmarks/results --models visualbert --pairs 3 --precision $(PRECISION)
	$(BIN)/python benchmarks/vqa_training.py --out benchmarks/results --models lxmert visualbert --precision $(PRECISION)
	$(BIN)/python benchmarks/vqa_inference.py --out benchmarks/results --models lxmert visualbert --precision $(PRECISION)
	$(BIN)/python benchmarks/retrieval.py --out benchmarks/results
	$(BIN)/python benchmarks/step_memory.py --out benchmarks/results --precision $(PRECISION)
	$(BIN)/python benchmarks/small_models.py --out benchmarks/results $(if $(AGAINST),--against $(AGAINST))
	$(BIN)/python benchmarks/store.py --out benchmarks/results --threads 1
	$(BIN)/python benchmarks/startup.py --out benchmarks/results --repeats 2
	$(BIN)/python benchmarks/table.py --out benchmarks/results

bench-more: $(VENV)/.dev
	$(BIN)/python benchmarks/pretraining.py --out benchmarks/results --models vilbert vlbert --precision $(PRECISION)
	$(BIN)/python benchmarks/vqa_training.py --out benchmarks/results --models vilbert vlbert --precision $(PRECISION)
	$(BIN)/python benchmarks/vqa_inference.py --out benchmarks/results --models vilbert vlbert --precision $(PRECISION)
	$(BIN)/python benchmarks/retrieval.py --out benchmarks/results --models visualbert lxmert vlbert vilbert cvlp --preset tiny \
	  --images 100 --captions 500 --fewest-regions 36 --regions 36 --batch-size 256 --sample-images 20 --single-images 5
	$(BIN)/python benchmarks/attention.py --out benchmarks/results
	$(BIN)/python benchmarks/roofline.py --out benchmarks/results --precision $(PRECISION)
	$(BIN)/python benchmarks/needed.py --out benchmarks/results
	$(BIN)/python benchmarks/log_cost.py --out benchmarks/results
	$(BIN)/python benchmarks/region_contrast.py --out benchmarks/results
	$(BIN)/python benchmarks/conversion.py --out benchmarks/results
	$(BIN)/python benchmarks/extraction.py --out benchmarks/results
	$(BIN)/python benchmarks/serving.py --out benchmarks/results
	$(BIN)/python benchmarks/scale.py --out benchmarks/results
	$(BIN)/python benchmarks/faults.py --out benchmarks/results

bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py --out benchmarks/results

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "visling needs Python 3.11 or newer; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing visling and PyTorch into $(VENV) (once; about two minutes) ..."
	$(INSTALL) -e '.[serve]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing visling with its development tools into $(VENV) (once; about three minutes) ..."
	$(INSTALL) -e '.[dev,formats,hf,log,serve,wandb]'
	@touch $@
