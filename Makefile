# Every target sets itself up: Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Two at a time, with threads that do not spin while others wait for a core
PYTEST = HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal

# What others made, measured beside ours, in an environment of its own
BENCH = $(VENV)-bench/bin/python
BENCH_STAMP = $(VENV)-bench/.installed
WHEELS ?= wheels

.PHONY: demo test test-slow test-all lint bench bench-quality bench-check gpu gpu-wheels performance model-cards \
	setup clean

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

# What `gpu` takes along to a machine without a network: for Python 3.12 on x86-64, without torch, triton and CUDA.
gpu-wheels:
	rm -rf $(WHEELS)/*.whl $(WHEELS)/site
	$(PYTHON) -m pip download --quiet --disable-pip-version-check -d $(WHEELS) -r benchmarks/gpu-wheels.txt \
		-c constraints.txt --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach libc,2_28 2_27 2_17 2_12 2_5,--platform manylinux_$(libc)_x86_64)
	@kib=$$(du -sk $(WHEELS) | cut -f1); echo "$(WHEELS): $$(ls $(WHEELS) | wc -l) wheels, $$kib KiB"; test $$kib -lt 51200

# On an NVIDIA GPU, with the machine's own python3, torch and transformers. Goes on where it was stopped.
# STEPS="a decoding" for some of the steps in benchmarks/gpu.py; DRY=1 rehearses, tiny and without a GPU.
gpu: $(if $(DRY),,$(WHEELS)/site)
	PYTHONPATH=$(CURDIR):$(CURDIR)/kernels:$(CURDIR)/trainers:$(abspath $(WHEELS))/site$(if $(PYTHONPATH),:$(PYTHONPATH)) \
		$(PYTHON) benchmarks/gpu.py $(STEPS) $(if $(DRY),--dry)

$(WHEELS)/site:
	@ls $(WHEELS)/*.whl > /dev/null || { echo "no wheels: make gpu-wheels first, where there is a network"; exit 1; }
	rm -rf $@.part
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target $@.part \
		$(WHEELS)/*.whl
	mv $@.part $@

# docs/performance.md and its pictures from the committed results.
performance: $(STAMP)
	$(BIN)/python benchmarks/page.py

# A card per architecture from the committed results.
model-cards: $(STAMP)
	$(BIN)/python benchmarks/model_cards.py

clean:
	rm -rf $(VENV) $(VENV)-bench build dist *.egg-info runs
