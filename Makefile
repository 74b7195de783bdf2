# One entry point for people and for CI. Needs Python >= 3.11, pip and a C compiler; everything else goes into .venv.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
CODE   := $(wildcard src tests tools benchmarks examples)

# A stamp says "installed, from these two files, for this folder": a copied checkout installs itself anew.
HERE   := $(shell printf '%s' "$(CURDIR)" | cksum | cut -d ' ' -f 1)
RUN    := $(VENV)/.installed-run-$(HERE)
DEV    := $(VENV)/.installed-dev-$(HERE)
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet --quiet --progress-bar off -c constraints.txt

# Models of tests are too small for two threads: two processes of one thread each take half the time. A module's tests
# stay together, because they share models.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

# The bundled model needs no network, and nothing here may quietly fetch another.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-all lint format types contracts unit bench wheel clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUN) ## install, then decode with the bundled model: stream, beam search, verify
	@printf '\n== 1/3  Stream a story from the bundled demonstration model\n\n'
	$(VENV)/bin/kvloom generate "Once upon a time" --temperature 0.8 --top-p 0.9 --repetition-penalty 1.1 --seed 5
	@printf '\n== 2/3  Search with four beams: the prompt is computed once, and each beam is a fork of it\n\n'
	$(VENV)/bin/kvloom generate "Once upon a time" --num-beams 4 --no-repeat-ngram-size 3 --max-new-tokens 40
	@printf '\n== 3/3  Verify: the output with the cache equals the output without it (in bfloat16 ties are frequent)\n\n'
	$(VENV)/bin/kvloom verify --dtype float32

test: lint types contracts unit ## lint, types, import contract, tests

test-all: lint types contracts $(DEV) ## the same, with the slow sweeps and other random examples each time
	$(PYTEST) -m "" --hypothesis-profile others

lint: $(DEV) ## ruff: rules and format, changing nothing
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)

format: $(DEV) ## ruff: fix what can be fixed, and format
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)

types: $(DEV) ## mypy, strict
	$(PY) -m mypy

contracts: $(DEV) ## floors import only downwards
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

unit: $(DEV) ## pytest, without the slow sweeps
	$(PYTEST)

bench: $(DEV) ## run every benchmarks/bench_*.py, one after the other; let the machine be idle
	@set -e; for script in benchmarks/bench_*.py; do printf '\n== %s\n' "$$script"; $(PY) "$$script"; done

wheel: $(DEV) ## build dist/kvloom-*.whl
	@rm -rf build  # setuptools would pack what an older build left there
	$(PY) -m pip --disable-pip-version-check wheel . --quiet --quiet --no-deps --no-build-isolation -w dist

install: $(DEV) ## only make the environment, with the development tools

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment ------------------------------------------------------------------------------------------

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "KVLoom needs Python 3.11 or newer; this is " \
		+ sys.version.split()[0] + ". Say: make PYTHON=/path/to/python3.11")'
	@echo "Making $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

# setuptools comes first, so that the editable build uses the pinned one and no second environment.
$(RUN): pyproject.toml constraints.txt | $(PY)
	@echo "Installing KVLoom into $(VENV): a minute or two, mostly PyTorch ..."
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(PY)
	@echo "Installing KVLoom and its development tools into $(VENV): a minute or two, mostly PyTorch ..."
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@ $(RUN)
