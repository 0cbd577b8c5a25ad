# Every target sets itself up: Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Two at a time, with threads that do not spin while others wait for a core
PYTEST = HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-all lint bench model-cards setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hf-rnn needs Python >= 3.11; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# Train a byte-level minGRU on the Python documentation, show what it learned, reload it: under 5 minutes on a CPU.
demo: $(STAMP)
	$(BIN)/python -m hf_rnn.cli.demo

test: $(STAMP)
	$(PYTEST) -m 'not gpu and not slow and not exhaustive'

# What `test` has no time for
test-slow: $(STAMP)
	$(PYTEST) -m 'slow and not gpu and not exhaustive'

# Everything, hours of it
test-all: $(STAMP)
	$(PYTEST) -m 'not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Side by side with peers on this machine; results in benchmarks/results.
bench: $(STAMP)
	$(BIN)/python benchmarks/scan.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/recurrent.py
	$(BIN)/python benchmarks/min_against_traditional.py
	$(BIN)/python benchmarks/mlstm.py
	$(BIN)/python benchmarks/xlstm.py
	$(BIN)/python benchmarks/state_tracking.py
	$(BIN)/python benchmarks/zero_order.py
	$(BIN)/python benchmarks/zero_order_memory.py
	$(BIN)/python benchmarks/zero_order_race.py
	$(BIN)/python benchmarks/language_model.py
	$(BIN)/python benchmarks/memory_scaling.py
	$(BIN)/python benchmarks/memory_retrieval.py
	$(BIN)/python benchmarks/memory_drift.py
	$(BIN)/python benchmarks/memory_tasks.py
	$(BIN)/python benchmarks/memory_language.py
	$(BIN)/python benchmarks/rate_constrained.py
	$(BIN)/python benchmarks/coding.py
	$(BIN)/python benchmarks/planning.py

# A card per architecture from the committed results.
model-cards: $(STAMP)
	$(BIN)/python benchmarks/model_cards.py

clean:
	rm -rf $(VENV) build dist *.egg-info runs
