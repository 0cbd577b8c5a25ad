# Every target sets itself up: Python >= 3.11, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
PIP = -m pip install --quiet --disable-pip-version-check
# Two at a time, with threads that do not spin while others wait for a core
pytest = HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(1)/bin/python -m pytest -n 2 --dist worksteal
FAST = -m 'not gpu and not slow and not exhaustive and not weights and not browser'
# What depends on the versions of transformers, accelerate, PEFT and huggingface_hub
VERSIONED = tests/test_private_members.py tests/models tests/trainers tests/hub tests/compatibility
# but for what is equations and torch alone
VERSIONED += $(addprefix --ignore=tests/,trainers/test_zo_estimates.py trainers/test_zo_directions.py \
	trainers/test_smt_losses.py models/test_torch_weights.py hub/test_kernel_repository.py)
TORCH = $(shell grep '^torch==' constraints.txt)

# What others made, measured beside ours, in an environment of its own
BENCH = $(VENV)-bench/bin/python
BENCH_STAMP = $(VENV)-bench/.installed
WHEELS ?= wheels

# And what forecasts
PEERS = $(VENV)-forecasting-peers

.PHONY: demo test test-oldest test-newest test-next test-slow test-weights test-browser test-all test-forecasting-peers lint \
	bench bench-quality bench-check checkpoints bench-forecasting gpu gpu-wheels performance model-cards setup clean

setup: $(STAMP)

$(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-next $(PEERS):
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

$(PEERS)/.installed: pyproject.toml constraints-forecasting-peers.txt | $(PEERS)
	$(PEERS)/bin/python $(PIP) -c constraints-forecasting-peers.txt -e '.[test,forecasting-peers]'
	touch $@

# Beside other people's forecasters, which `test` does not install
test-forecasting-peers: $(PEERS)/.installed
	$(call pytest,$(PEERS)) tests/forecasting_peers

# Forecasts beside statsforecast's, fine-tuning, classes: three quarters of an hour on 2 cores. Goes on where it was interrupted.
bench-forecasting: $(PEERS)/.installed
	$(PEERS)/bin/python benchmarks/forecasting.py
	$(PEERS)/bin/python benchmarks/forecast_tuning.py
	$(PEERS)/bin/python benchmarks/series_classification.py
	$(PEERS)/bin/python benchmarks/page.py

# What `test` has no time for
test-slow: $(STAMP)
	$(call pytest,$(VENV)) -m 'slow and not gpu and not exhaustive'

# Trained networks of others, 14 MB of wheels that pip downloads once into pytest's cache. Not in CI.
test-weights: $(STAMP)
	$(BIN)/python -m pytest -m weights tests/weights

# The server's page in a browser: needs a Chromium of this machine. Not in CI.
test-browser: $(STAMP)
	$(BIN)/python $(PIP) -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest -m browser tests/serving

# Everything that needs no network, hours of it
test-all: $(STAMP)
	$(call pytest,$(VENV)) -m 'not gpu and not weights and not browser'

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
	$(BENCH) benchmarks/pictures.py

# The trained models that come with the package, anew, beside those that do; results in runs/checkpoints.
# DATA=tinyshakespeare.txt for that of the plays. Half an hour on one core.
checkpoints: $(STAMP)
	$(BIN)/python benchmarks/checkpoints.py $(if $(DATA),--data $(DATA))

# What takes hours: learning, memory, faults. Goes on where it was interrupted. DATA=text.txt for the text.
bench-quality: $(BENCH_STAMP)
	$(BENCH) benchmarks/suite.py quality $(if $(DATA),--data $(DATA))
	$(BENCH) benchmarks/page.py
	$(BENCH) benchmarks/pictures.py

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
	$(BIN)/python benchmarks/pictures.py

# A card per architecture from the committed results.
model-cards: $(STAMP)
	$(BIN)/python benchmarks/model_cards.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info runs
