# make demo and make test set everything up; the rest is for development.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export SEQKERNELS_BUILD ?= 1

.PHONY: demo test bench bench-quick lint build clean
.DEFAULT_GOAL := test

$(VENV)/.installed: requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation --no-deps --editable .
	touch $@

build: $(VENV)/.built

demo: build
	$(RUN) -m seqkernels info
	$(RUN) examples/translate.py

test: build
	$(RUN) -m pytest

bench: build
	$(RUN) benchmarks/run.py

bench-quick: build
	$(RUN) benchmarks/run.py --quick

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*')
	$(VENV)/bin/mypy

clean:
	rm -rf build $(VENV)
