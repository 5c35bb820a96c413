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

# Tests that kill real processes or measure have the machine to themselves. The others run side by side, with a thread each: a
# test that is about threads sets their number.
ALONE := fault or cluster or slurm or alone
PYTEST := pytest --durations 20 --durations-min 10 -m "not gpu and not long and
test: SHELL := /bin/bash
test: lint ## check style and types, and run every test that needs no GPU
	@# Both parts run, whatever becomes of the first, whose last line stands beside that of the second in the end.
	@$(RUN); export PATH; log=$$(mktemp); failed=0; trap 'exit 130' INT; \
	echo "== side by side: all but: $(ALONE)"; \
	( set -o pipefail; OMP_NUM_THREADS=1 $(PYTEST) not ($(ALONE))" -n logical --maxprocesses 8 --dist loadfile | tee $$log ) || failed=1; \
	echo "== alone: $(ALONE)"; \
	$(PYTEST) ($(ALONE))" || failed=1; \
	tail -n 1 $$log; rm $$log; exit $$failed

test-fast: setup ## the tests that take seconds
	$(RUN) pytest -m "not gpu and not slow and not fault and not cluster and not slurm"

gpu: ## what needs a GPU, with PYTHON's own packages; PART=1 or 2 (7 minutes each; default: both), OUT=FOLDER for the results
	benchmarks/gpu.sh $(PYTHON) "$(PART)" $(OUT)

bench: setup ## run the benchmarks
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; PYTHONPATH=. $(RUN) python "$$file"; done

clean: ## remove the demo's data and run, and caches; .venv and other runs stay
	rm -rf .data/demo runs/demo .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
