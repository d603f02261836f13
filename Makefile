# Short verbs. Each does its own set-up: a machine with only Python, make and git is enough.
#
# PYTHON    interpreter that makes the environment (Python 3.10 or newer)
# TORCH     pip's arguments for PyTorch, for instance
#           make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#           Changing PYTHON or TORCH makes the environment anew; export them to keep a choice.
# WORKERS   processes that run the tests
# ARGS      further arguments: make test ARGS="-k kronecker", make bench ARGS="--rounds 20"
PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
ARGS ?=

# One environment for all verbs: one PyTorch on disk, and `make demo` adds only matplotlib and
# scikit-learn to what the package needs. All paths are relative: the checkout's may have spaces.
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

# Libraries that the benchmark compares with, each in an environment of its own, named after it. The
# versions of the last two, which are compared in part, are those that their workers were written for.
PEERS := $(addprefix build/peers/,backpack-for-pytorch curvlinops-for-pytorch hessian-eigenthings kronfluence nngeometry)
VERSION_kronfluence := ==1.0.1
VERSION_nngeometry := ==0.4

export PYTHON TORCH
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all mutate docs lint format bench $(PEERS) FORCE

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/installed  ## Run the example; it writes docs_src/examples/figures/digits.png
	$(RUN) docs_src/examples/digits.py

test: $(VENV)/installed  ## Run the tests and the examples in docstrings, without the slow ones
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(ARGS)

test-all: $(VENV)/installed  ## Run all tests
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

mutate: $(VENV)/installed  ## Break the mathematics in one place after the other: do the tests see it?
	$(RUN) test/mutation/mutate.py --jobs $(WORKERS) $(ARGS)

docs: $(VENV)/installed  ## Build the documentation into build/docs/index.html; warnings are errors
	$(RUN) -m sphinx -W --keep-going -n -b html $(ARGS) docs build/docs

lint: $(VENV)/installed  ## Check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(VENV)/installed  ## Repair style and format where a tool can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# A peer that cannot be had is an empty cell in the tables, not an error.
bench: $(VENV)/installed  ## Measure time and memory, compare with other libraries, write docs_src/benchmark/results
	-$(MAKE) --no-print-directory --keep-going $(PEERS)
	$(RUN) docs_src/benchmark/bench.py --peers build/peers --write $(ARGS)

# The package (editable) and its tools, anew when pyproject.toml changes. PyTorch is there already,
# and the constraint keeps pip from replacing it.
$(VENV)/installed: $(VENV)/torch.txt pyproject.toml
	$(PIP) install --constraint $(VENV)/torch.txt --editable ".[dev]"
	@touch $@

# The newest release of a peer, or the one named above, with the same PyTorch.
$(PEERS): build/peers/%: build/peers/%/torch.txt
	$@/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --constraint $< $*$(VERSION_$*)

# PyTorch comes first, alone, so that TORCH may name an index that has nothing else. The recipe
# always runs, but touches its file only when the interpreter, TORCH or the checkout's place have
# changed. TORCH is not quoted: it is several arguments.
$(VENV)/torch.txt $(PEERS:=/torch.txt): FORCE
	@wanted="$$("$$PYTHON" --version) | $$TORCH | $$PWD"; \
	if [ -f $@ ] && [ "$$(cat $(@D)/made-for 2>/dev/null)" = "$$wanted" ]; then exit 0; fi; \
	set -ef; \
	"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "curvlinops needs Python 3.10 or newer: make PYTHON=python3.x")'; \
	echo "Making $(@D) with $$TORCH (once; this takes a minute or more)"; \
	"$$PYTHON" -m venv --clear $(@D); \
	$(@D)/bin/python -m pip --disable-pip-version-check install $$TORCH; \
	printf '%s\n' "$$wanted" > $(@D)/made-for; \
	$(@D)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

FORCE:
