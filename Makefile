# Two commands: `make train` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
TORCH ?= 2.13.0
TRITON ?= 3.7.1
CONFIG ?= configs/quickstart.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
export PYTHONSAFEPATH := 1

.PHONY: train test lint clean
.DELETE_ON_ERROR:

train: $(VENV)/.run-ready
	$(BIN)/distattn train $(CONFIG) $(ARGS)

# Three processes for two cores: files that mostly wait for Slurm, Ray and faults begin first, beside those that compute.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.dev-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

# Exact versions first: a range may pull another build than the one that the tests know.
$(VENV)/.torch-ready:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "distattn needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: set PYTHON=…" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	touch $@

$(VENV)/.run-ready: $(VENV)/.torch-ready pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[data,plot]'
	touch $@

# DS_BUILD_OPS=0: DeepSpeed compiles no kernels of its own; its engine is all that is used.
$(VENV)/.dev-ready: $(VENV)/.torch-ready pyproject.toml
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' triton==$(TRITON)
	touch $@ $(VENV)/.run-ready
