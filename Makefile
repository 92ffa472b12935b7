# Two commands on a new machine (Python 3.11+ and make, nothing else):
#   make quickstart    make test
# Both create .venv and install the versions of constraints.txt; later calls reuse it.

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-all lint clean

VENV := .venv
BIN := $(VENV)/bin
# Set PYTHON to choose another interpreter: make test PYTHON=/opt/python3.12/bin/python3
PYTHON ?=
# Passed on: make quickstart ARGS="--minutes 1"
ARGS ?=
# Test processes. Two fit a machine of two cores; each takes about 1 GB.
WORKERS ?= 2
# Extra words for the installation of torch alone, for example an index that holds CPU-only builds.
TORCH_PIP_ARGS ?=

help:
	@echo "make quickstart   install, then build a corpus, train a small model and write a report (about 6 minutes)"
	@echo "make test         install with the test tools, check style, run the tests (about 11 minutes)"
	@echo "make test-all     the same with the slow ones"
	@echo "make lint         style only"
	@echo "make install      the package with its server and agents, into $(VENV)"
	@echo "make clean        remove $(VENV) and caches"
	@echo "Settings: ARGS=\"--minutes 1\"  PYTHON=python3.12  WORKERS=4  TORCH_PIP_ARGS=..."

quickstart: install
	@$(BIN)/moonbase quickstart $(ARGS)

# One thread per test process: two processes on two cores are faster than one with two threads at tiny shapes.
# The slow ones are further seeds and further moments at which to be killed of what the others try once.
test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(ARGS)

test-all: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

lint: install-dev
	@$(BIN)/ruff check .

install: $(VENV)/.stamp-base
install-dev: $(VENV)/.stamp-dev $(VENV)/.stamp-other-inspect

# The stamps are touched last, so that an interrupted installation is taken up again.
$(VENV)/.stamp-torch: constraints.txt
	@set -eu; \
	chosen=""; \
	for candidate in "$(PYTHON)" python3 python3.13 python3.12 python3.11 python; do \
	  [ -n "$$candidate" ] || continue; \
	  if "$$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then chosen="$$candidate"; break; fi; \
	  if [ "$$candidate" = "$(PYTHON)" ]; then break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "moonbase needs Python 3.11 or newer; found: $$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo none)." \
	    "Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 2; \
	fi; \
	if ! "$$chosen" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$chosen cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; \
	fi; \
	if ! $(BIN)/python -c 'import pip, sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "moonbase: creating $(VENV) with $$("$$chosen" --version)"; \
	  "$$chosen" -m venv --clear $(VENV); \
	fi
	@echo "moonbase: installing torch, the largest part (a few minutes on a slow line) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	  $(TORCH_PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.stamp-base: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	@echo "moonbase: installing moonbase and what it needs ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve,agents]'
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt $(VENV)/.stamp-base
	@echo "moonbase: installing the test tools ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve,agents,dev]'
	@touch $@

# Another version of Inspect, which the contract of our providers is tried against too.
$(VENV)/.stamp-other-inspect: $(VENV)/.stamp-dev
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/other-inspect \
	  inspect-ai==0.3.260 && touch $@ || echo "moonbase: inspect-ai 0.3.260 cannot be had; its test is skipped"

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find moonbase tests -type d -name __pycache__ -prune -exec rm -rf {} +
