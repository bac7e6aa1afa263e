# make tutorial   run every notebook, write build/tutorial/index.html
# make test       lint, types, unit tests, notebooks against their committed outputs, here and as an older processor
# make test-all   the unit tests, slow ones included
# make test-lowest  the unit tests with the lowest versions that pyproject.toml allows, in .venv-lowest (some GB)
# make test-newest  the unit tests with the newest versions there are, in .venv-newest (some GB)
# make lab        open the notebooks in JupyterLab
# make site       the lessons as they were committed, and the reference, as build/site/index.html
# make refresh    run the notebooks again in place, keep the new outputs and their thumbnails
# make bench      measure what results/ does not have yet (hours), draw the figures, write the tables
# make browser    install a Chromium for the test in JupyterLab, where there is none
# make binder     the address that opens the lessons of your fork on Binder
# make badges     put badges into the README that launch your fork's lessons (make badges OWNER/REPO; default: "origin")
#
# Each makes .venv first. Another interpreter: make test PYTHON=python3.12
# Parameters of the notebooks: make tutorial ARGS="-p bits w2a2"
# Some benchmarks: make bench ARGS="speed tables"; whether all work, in minutes: make bench ARGS=--short

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
EXTRAS := notebooks,export,test,dev
MORE_STAMP := $(VENV)/.stamp-more
MORE_EXTRAS := browser,site
CONSTRAINTS := constraints.txt
LOWEST := .venv-lowest
NEWEST := .venv-newest
UNIT_EXTRAS := notebooks,export,test
PYTEST := python -m pytest -n 2 --dist loadfile
OLDER := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
AT_LEAST_3_11 := import sys; sys.exit(sys.version_info < (3, 11))

.PHONY: help install tutorial test test-all test-lowest test-newest lab site refresh bench browser binder badges binder-check clean

help:
	@sed -n '/^$$/q;s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# The interpreter of an .venv that is already there is kept. One made without pip (uv) or cut short gets its pip.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON). Name a Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c '$(AT_LEAST_3_11)' || { \
	  echo "dfqlib needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "Could not make $(VENV) (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }

$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@$(BIN)/python -c '$(AT_LEAST_3_11)' || { \
	  echo "$(VENV) has $$($(BIN)/python --version), dfqlib needs 3.11 or newer: remove $(VENV) and run make again." >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	@echo "Installing dfqlib and what it needs into $(VENV) (about a minute, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@touch $@

$(LOWEST)/constraints.txt: pyproject.toml tools/lowest.py | $(LOWEST)/bin/python
	@$(LOWEST)/bin/python tools/lowest.py $(UNIT_EXTRAS) >$@.new && mv $@.new $@

# Only `make test` and `make site` need these.
$(MORE_STAMP): $(STAMP)
	@echo "Installing Sphinx for the site and Playwright for the test in JupyterLab (half a minute, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(MORE_EXTRAS)]"
	@touch $@

tutorial: $(STAMP)
	$(BIN)/python tools/tutorial.py $(ARGS)

# Without a person at the terminal, as in continuous integration, a missing browser is installed without asking.
test: $(MORE_STAMP)
	@[ -t 0 ] || $(BIN)/python tools/browser.py --install || true
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/$(PYTEST) --nbval tests notebooks
	@[ "$$(uname -m)" != x86_64 ] || echo "The lessons once more, as an x86 processor without AVX-512, bfloat16 and VNNI computes them"
	[ "$$(uname -m)" != x86_64 ] || $(OLDER) $(BIN)/$(PYTEST) --nbval notebooks

test-all: $(MORE_STAMP)
	$(BIN)/$(PYTEST) -m "not hours" tests

# The site and the browser are left out: their tests skip. So are the notebooks, whose outputs are of the tested versions.
test-lowest:
	@$(MAKE) --no-print-directory install VENV=$(LOWEST) CONSTRAINTS=$(LOWEST)/constraints.txt EXTRAS=$(UNIT_EXTRAS)
	$(LOWEST)/bin/$(PYTEST) tests

test-newest:
	@$(MAKE) --no-print-directory install VENV=$(NEWEST) CONSTRAINTS=/dev/null EXTRAS=$(UNIT_EXTRAS)
	$(NEWEST)/bin/$(PYTEST) tests

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

site: $(MORE_STAMP)
	$(BIN)/python tools/website.py $(ARGS)

refresh: $(STAMP)
	$(BIN)/python tools/refresh.py $(ARGS)
	$(BIN)/python tools/thumbnails.py $(filter --check,$(ARGS))

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

browser: $(MORE_STAMP)
	$(BIN)/python tools/browser.py --install

binder: $(STAMP)
	@$(BIN)/python tools/binder.py url

# In `make badges OWNER/REPO` the second word names the repository and no target.
ifeq (badges,$(firstword $(MAKECMDGOALS)))
REPO ?= $(word 2,$(MAKECMDGOALS))
.DEFAULT: ; @:
endif

badges: $(STAMP)
	$(BIN)/python tools/badges.py $(REPO)

# Minutes, and some GB for as long as it takes: what Binder would do, in a clean clone and a new environment.
binder-check: $(STAMP)
	$(BIN)/python tools/binder.py check

clean:
	rm -rf build .mypy_cache .pytest_cache .ruff_cache
