# Each target makes what it needs, so that `make demo` and `make test` work on a machine with only Python and pip.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    := $(BIN)/python -m

.DEFAULT_GOAL := help
.PHONY: help demo test check format docs docs-serve clean chromium

help:  ## Show what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
		awk -F '\t' '{ printf "  make %-12s %s\n", $$1, $$2 }'

demo: $(VENV)/.installed-demo  ## Prune, distill and quantize a network on real digits, and write a report
	@$(BIN)/slivo demo

test: $(VENV)/.installed-dev chromium  ## Run all tests, doctests included, with branch coverage
	@# One thread for each worker: they share the cores, and results then do not depend on how many there are.
	@OMP_NUM_THREADS=1 $(RUN) pytest -q -n auto --maxprocesses 8 --cov --cov-report=term

check: $(VENV)/.installed-dev  ## Check format, lint, types and layers
	@$(RUN) ruff format --check .
	@$(RUN) ruff check .
	@$(RUN) mypy
	@$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## Mend format and what lint can mend
	@$(RUN) ruff format .
	@$(RUN) ruff check --fix .

docs: $(VENV)/.installed-docs  ## Build the documentation into site/
	@$(RUN) mkdocs build --strict

docs-serve: $(VENV)/.installed-docs  ## Show the documentation on http://127.0.0.1:8000 while you write
	@$(RUN) mkdocs serve

clean:  ## Remove the environment and all that was built; results in runs/ stay
	@rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage .coverage.*

# One environment for everything; an extra is installed when a target first needs it, and again when its versions change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing slivo[$*] into $(VENV); the first time this downloads PyTorch and takes a few minutes"
	@$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

# Debian's Python may lack ensurepip; then its own pip, if there is one, can bring pip into the environment.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); install Python 3.11 or later"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "slivo needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) -V 2>&1); choose one: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) >/dev/null 2>&1 && \
		$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip >/dev/null 2>&1; } || { \
		rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }

# A test opens the report in a browser.
chromium:
	@for name in "$$CHROME" chromium chromium-browser google-chrome; do \
		if [ -n "$$name" ] && command -v "$$name" >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing Chromium, in which a test opens the report"; \
		apt-get update -qq >/dev/null && apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	fi && command -v chromium >/dev/null || { \
		echo "The tests need Chromium to open the report: install it, or set CHROME to a browser of its kind"; exit 1; }
