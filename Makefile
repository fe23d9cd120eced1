# Each target sets up .venv by itself: once, and again when the requirements change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m

.PHONY: demo test lint types bench

demo: $(STAMP)
	$(BIN)/adaptive-loss demo

test: $(STAMP)
	$(RUN) pytest -n 2 -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

bench: $(STAMP)
	$(RUN) benchmarks.overhead

$(STAMP): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)
