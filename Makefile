# Every target sets itself up: Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PIP = -m pip install --quiet --disable-pip-version-check
# Two at a time, with threads that do not spin while others wait for a core
pytest = HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(1)/bin/python -m pytest -n 2 --dist worksteal
FAST = -m 'not gpu and not slow and not exhaustive'
# What depends on the versions of transformers, accelerate, PEFT and huggingface_hub
VERSIONED = tests/test_private_members.py tests/models tests/trainers tests/hub tests/compatibility
TORCH = $(shell grep '^torch==' constraints.txt)

# What others made, measured beside ours, in an environment of its own
BENCH = $(VENV)-bench/bin/python
BENCH_STAMP = $(VENV)-bench/.installed
WHEELS ?= wheels

.PHONY: demo test test-oldest test-newest test-next test-slow test-all lint bench bench-quality bench-check bench-gpu gpu-wheels performance model-cards \
	setup clean

setup: $(STAMP)

$(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-next:
	$(PYTHON) -c 'import sys; sys.exit("hf-rnn needs Python >= 3.11; set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $@

$(STAMP): pyproject.toml constraints.txt | $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[cpu,plot]'
	touch $(VENV)/.demo

# Train a byte-level minGRU on the Python documentation, show what it learned, reload it.
demo: $(VENV)/.demo
	$(BIN)/python -m hf_rnn.cli.demo

test: $(STAMP)
	$(call pytest,$(VENV)) $(FAST)

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt | $(VENV)-oldest
	$(VENV)-oldest/bin/python $(PIP) -c constraints-oldest.txt -e '.[test]'
	touch $@

# On the oldest versions that pyproject.toml allows
test-oldest: $(VENV)-oldest/.installed
	$(call pytest,$(VENV)-oldest) $(FAST) $(VERSIONED)

# On the newest versions that it allows, looked for each time; torch stays, whose newer builds bring CUDA's gigabytes
test-newest: | $(VENV)-newest
	$(VENV)-newest/bin/python $(PIP) --upgrade --upgrade-strategy eager $(TORCH) -e '.[test]'
	$(call pytest,$(VENV)-newest) $(FAST) $(VERSIONED)

# On the newest that there are, without pyproject.toml's cap: what the next release of transformers breaks. Not in CI.
test-next: | $(VENV)-next
	$(VENV)-next/bin/python $(PIP) $(TORCH) -e '.[test]'
	$(VENV)-next/bin/python $(PIP) --upgrade $(TORCH) transformers accelerate peft huggingface_hub datasets
	$(call pytest,$(VENV)-next) $(FAST) $(VERSIONED)

# What `test` has no time for
test-slow: $(STAMP)
	$(call pytest,$(VENV)) -m 'slow and not gpu and not exhaustive'

# Everything, hours of it
test-all: $(STAMP)
	$(call pytest,$(VENV)) -m 'not gpu'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BENCH_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(BENCH) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BENCH) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps nncodec
	touch $(BENCH_STAMP)

# Speed beside every peer on this machine, under 20 minutes on 2 cores; results in benchmarks/results.
bench: $(BENCH_STAMP)
	$(BENCH) benchmarks/suite.py speed
	$(BENCH) benchmarks/page.py

# What takes hours: learning, memory, faults. Goes on where it was interrupted. DATA=text.txt for the text.
bench-quality: $(BENCH_STAMP)
	$(BENCH) benchmarks/suite.py quality $(if $(DATA),--data $(DATA))
	$(BENCH) benchmarks/page.py

# Speed again, compared with the committed results: ratios, never seconds.
bench-check: $(BENCH_STAMP)
	$(BENCH) benchmarks/suite.py check

# What `bench-gpu` installs, for a machine without a network: gigabytes, CUDA's libraries among them.
gpu-wheels:
	$(PYTHON) -m pip download --quiet -d $(WHEELS) -c constraints.txt '.[bench,bench-gpu]' 'setuptools>=77' wheel

# On an NVIDIA GPU, from the folder of wheels alone. Goes on where it was interrupted, question by question.
bench-gpu:
	test -x $(BENCH) || $(PYTHON) -m venv $(VENV)-bench
	$(BENCH) -m pip install --quiet --disable-pip-version-check --no-index --find-links $(WHEELS) -c constraints.txt \
		-e '.[bench,bench-gpu]'
	$(BENCH) benchmarks/suite.py gpu
	$(BENCH) benchmarks/page.py

# docs/performance.md and its pictures from the committed results.
performance: $(STAMP)
	$(BIN)/python benchmarks/page.py

# A card per architecture from the committed results.
model-cards: $(STAMP)
	$(BIN)/python benchmarks/model_cards.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info runs
