# What a person types. `make demo` and `make test` set everything up by themselves.
# PYTHON is the interpreter that creates .venv (3.11 or later) and, for `make gpu`, the one that runs it all.

PYTHON ?= python3
PART ?= 1 2
OUT ?= benchmarks/results/gpu
BIN := .venv/bin
# DeepSpeed's launcher and torch's extension builder look for `python` and `ninja` on the PATH.
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint gpu bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## create .venv and install what pyproject.toml names

# The stamp makes this run again only when pyproject.toml changes.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; use: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ echo "cannot create .venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[dev]'
	@touch $@

demo: setup ## build the demo shards, train, evaluate and print the table
	$(RUN) wads shards demo --out .data/demo --categories 2
	@# Every GPU there is; without one, two CPU ranks.
	@$(RUN); export PATH; \
	if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then ranks=; \
	else export DS_ACCELERATOR=cpu; ranks="--num_accelerators 2"; fi; \
	set -x; deepspeed $$ranks launch/train.py --config configs/demo.toml

lint: setup
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# Tests that kill real processes mostly wait, so that three files at a time share the cores; those that measure have the machine
# to themselves. The others run with a thread each: a test that is about threads sets their number.
FAULTS := (fault or cluster or slurm) and not alone
PYTEST := pytest --durations 20 --durations-min 10 -m "not gpu and not long and
test: SHELL := /bin/bash
test: lint ## check style and types, and run every test that needs no GPU
	@# All parts run, whatever becomes of one; their last lines stand together in the end.
	@$(RUN); export PATH; logs=$$(mktemp -d); failed=0; trap 'rm -r $$logs; exit 130' INT; set -o pipefail; \
	part() { echo "== $$1"; shift; "$$@" | tee -i $$logs/$$(ls $$logs | wc -l) || failed=1; }; \
	part "side by side" env OMP_NUM_THREADS=1 $(PYTEST) not (alone or $(FAULTS))" -n logical --maxprocesses 8 --dist loadfile; \
	part "faults" $(PYTEST) $(FAULTS)" -n 3 --dist loadfile --no-loadscope-reorder; \
	part "alone" $(PYTEST) alone"; \
	tail -qn 1 $$logs/*; rm -r $$logs; exit $$failed

test-fast: setup ## the tests that take seconds
	$(RUN) pytest -m "not gpu and not slow and not fault and not cluster and not slurm"

gpu: ## what needs a GPU, with PYTHON's own packages; PART=1 or 2 (7 minutes each; default: both), OUT=FOLDER for the results
	benchmarks/gpu.sh $(PYTHON) "$(PART)" $(OUT)

bench: setup ## run the benchmarks
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; PYTHONPATH=. $(RUN) python "$$file"; done

clean: ## remove the demo's data and run, and caches; .venv and other runs stay
	rm -rf .data/demo runs/demo .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
