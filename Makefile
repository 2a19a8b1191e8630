# make demo, make test, make check: each does all set-up by itself on a fresh machine.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -E -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# .venv belongs to the Python that made it. Another one has an environment of its own, such as .venv-3.13
OWNER := $(shell sed -n 's/^version[a-z_]* *= *\([0-9]*\.[0-9]*\).*/\1/p' .venv/pyvenv.cfg 2>/dev/null)
VENV := .venv$(addprefix -,$(filter-out $(OWNER),$(if $(OWNER),$(or $(VERSION),unknown))))
OLDEST := .venv-oldest-$(VERSION)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Neither the caller's environment nor a question may get into the way
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-oldest check docs bench lint format clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt

# The oldest versions have no wheels for newer Pythons
$(STAMP): SUITS := v >= (3, 11)
$(OLDEST)/.installed: SUITS := (3, 11) <= v < (3, 13)

$(STAMP) $(OLDEST)/.installed:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; $(SUITS) or sys.exit( \
	    "xr_anysat needs Python 3.11 or newer (make test-oldest: 3.11 or 3.12), and $(PYTHON) is %d.%d: name another one, as in make PYTHON=python3.12 $(MAKECMDGOALS)" % v)'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -c $(filter constraints%,$^) -e '.[test]'
	@touch $@

demo: $(STAMP)  ## Make a scene, embed it, and draw a picture, into demo/
	$(BIN)/python -m xr_anysat demo

test: lint  ## Lint, types, and all tests
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal

coverage: $(STAMP)  ## All tests with coverage, which takes half as long again; fails below 90 %
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest -n auto --maxprocesses=4 --dist worksteal
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --show-missing --skip-covered

test-oldest: $(OLDEST)/.installed  ## All tests on the oldest versions that pyproject.toml allows (Python 3.11 or 3.12)
	$(OLDEST)/bin/python -m pytest -n auto --maxprocesses=4 --dist worksteal

check: lint  ## Lint, types, and the quick tests: an answer within two minutes
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal -m "not slow"

docs: $(STAMP)  ## The documentation, into docs/_build; runs the notebooks
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build

bench: $(STAMP)  ## Ratios of speed and memory, into bench.json; beside upstream's with UPSTREAM=a checkout
	$(BIN)/python benchmarks/bench.py $(if $(UPSTREAM),--upstream $(UPSTREAM)) $(ARGS)

lint: $(STAMP)  ## Lint, types and the layers of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove all that make made
	rm -rf .venv .venv-* demo bench.json docs/_build docs/api docs/notebooks .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
