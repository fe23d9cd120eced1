# Each target sets up .venv by itself: once, and again when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m

.PHONY: demo test coverage torture lint types audit bench

demo: $(STAMP)
	$(BIN)/adaptive-loss demo

test: $(STAMP)
	$(RUN) pytest -n 2 --dist worksteal -q

# Branches too, of all that the tests start; the executor's must be whole.
coverage: $(STAMP)
	rm -f .coverage .coverage.*
	$(RUN) coverage run -m pytest -n 2 --dist worksteal -q
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=90 --format=total
	$(BIN)/coverage report --fail-under=100 --show-missing --include='adaptive_loss/loss_executor.py'

# At most an hour on two cores; docs/reliability.md is written by `python -m tests.reliability --write`.
torture: $(STAMP)
	$(RUN) tests.reliability

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

# Skips itself, in under a minute, where pip-audit or its data cannot be reached.
audit: $(STAMP)
	$(BIN)/python scripts/audit.py

bench: $(STAMP)
	$(RUN) benchmarks.overhead

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)
