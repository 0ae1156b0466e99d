# make demo and make test set everything up; the rest is for development.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# What is never imported need not be compiled.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
export SEQKERNELS_BUILD ?= 1
export SEQKERNELS_EMULATOR ?= 1
# Of each test function every so-many-th case, in `interpret` and `sanitize`.
EVERY ?= 1

.PHONY: demo test bench bench-quick bench-engines errors docs lint build pure wheel wheels sanitize interpret kernels \
	gpu gpu-test gpu-bench ci clean
.DEFAULT_GOAL := test

$(VENV)/.installed: requirements-dev.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements-dev.txt
	touch $@

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) \
		--no-build-isolation --no-deps --editable .
	touch $@

build: $(VENV)/.built

demo: build
	$(RUN) -m seqkernels info
	$(RUN) examples/translate.py

# In a process for each core, up to four, whose threads do not spin while they wait for each other; each begins with a
# stretch of its own, so that neighbours find what was compiled, and what they are judged by.
test: build
	OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

bench: build
	$(RUN) benchmarks/run.py

bench-quick: build
	$(RUN) benchmarks/run.py --quick

# Inference beside ONNX Runtime and OpenVINO, which are installed for it, once.
$(VENV)/.engines: $(VENV)/.built pyproject.toml
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) \
		--no-build-isolation --editable ".[bench-engines]"
	touch $@

bench-engines: $(VENV)/.engines
	$(RUN) benchmarks/run.py --providers torch,native,onnxruntime,openvino --json report/bench-engines.json \
		-k "not attention and not forward_backward"

# The site of docs/, in site/: strict, then looked at file by file and in headless Chromium. (Debian: chromium, chromium-driver.)
$(VENV)/.docs: $(VENV)/.installed requirements-docs.txt
	$(PIP) -r requirements-docs.txt
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	$(RUN) -m pytest --quiet docs/_site

# docs/errors.md: recurrences and attention against float64.
errors: build
	$(RUN) -m benchmarks.errors

# The checks are listed in .pre-commit-config.yaml.
lint: $(VENV)/.installed
	$(VENV)/bin/pre-commit run --all-files

# Installed without the compiled module, and tested.
pure: $(VENV)/.installed
	.ci/pure $(RUN)

# Built in isolation in an environment without torch, within a minute, or four with nvcc, and tried in a new one with torch; the wheel lies in dist/.
wheel: $(VENV)/.installed
	.ci/wheel $(PYTHON) $(RUN)

# For CPython 3.10 to 3.13 in manylinux containers, which docker runs; into wheelhouse/.
CIBUILDWHEEL := cibuildwheel==4.3.3
wheels:
	$(PYTHON) -m venv build/cibuildwheel
	build/cibuildwheel/bin/pip install --quiet --disable-pip-version-check $(CIBUILDWHEEL)
	build/cibuildwheel/bin/cibuildwheel --platform linux

# Native tests under the address and undefined-behaviour sanitizers; CI runs a third of each function's cases.
sanitize: $(VENV)/.installed
	.ci/sanitize $(RUN) $(EVERY)

# The Triton kernels in Triton's interpreter, which has to be switched on before a kernel is defined. All cases take ten
# minutes on two cores; CI runs a part of each test function's.
interpret: build
	TRITON_INTERPRET=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
		-m "not many and not slow" -k triton --every $(EVERY) \
		$(addprefix tests/ops/test_,attention.py attention_options.py attention_pages.py recurrence.py \
		recurrence_options.py checkpoint.py) $(addprefix tests/backends/test_triton_,descriptors.py precision.py recurrence.py tune.py)

# The Triton kernels compiled for GPUs, held to the reviewed budget: those of bfloat16 for Hopper, and some for others;
# "python -m seqkernels compile" compiles all for all, in several minutes.
kernels: build
	$(RUN) -m seqkernels compile --arch sm_90 --only bf16
	$(RUN) -m seqkernels compile --arch sm_80,sm_100 --only "forward bf16 D=128"

# On a machine with a GPU, offline, by a Python that has torch, triton, pytest and hypothesis, and pybind11 and nvcc for
# the module of CUDA kernels: the tests of the GPU backends on the device, memcheck over some of them, and the benchmarks, whose summary is printed last.
GPU_PYTHON ?= python3
gpu:
	$(MAKE) gpu-test
	$(MAKE) gpu-bench

gpu-test:
	.ci/gpu $(GPU_PYTHON)

gpu-bench:
	if command -v nvcc >/dev/null; then $(GPU_PYTHON) -m benchmarks.cuda_latency; else echo "gpu-bench: no nvcc, no latencies" >&2; fi
	$(GPU_PYTHON) -m benchmarks.gpu

ci:
	.ci/run

clean:
	rm -rf build site $(VENV)
