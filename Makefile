# make test   sets up .venv, builds, checks style and types, runs the tests
# make demo   sets up .venv, builds, runs the demo and writes runs/demo/report.html
# make sanitize  the C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on the tests' shapes
# make gpu-check  builds, tests, sanitizes and measures the GPU kernels, with PYTHON as it is
# make bench  each op beside torch, against this device's committed results; instruction counts
# PYTHON=...  which Python makes the environment (3.11 or later)
# TORCH=...   what pip installs as torch, for example a CPU or CUDA build of your choice

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CXX_FILES = $(shell git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.h' 'tests/*.cpp' 'tests/*.cu')

SANITIZED = beam_step beam_step_direct beam_step_dtypes block_patterns block_sparse_linear direct direct_guards low_rank_linear not_finite prefix_tree prefix_tree_misuse rnnt_loss storage tree_attention

.PHONY: build demo test lint sanitize gpu-check bench clean

# torch comes first and alone: the extension is compiled against it, and no later requirement may
# replace it. pip shows what it does, since this takes minutes.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prunelm: expected Python 3.11 or later, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@echo "prunelm: 1 of 3, pip and what builds need"
	$(BIN)/pip install --upgrade pip "setuptools>=77" wheel "pybind11>=3.0" ninja
	@echo "prunelm: 2 of 3, torch; unpacking it takes a minute or more"
	$(BIN)/pip install "$(TORCH)" numpy
	@echo "prunelm: 3 of 3, the other packages, and the extension compiled without CUDA"
	PRUNELM_CUDA=0 $(BIN)/pip install --no-build-isolation --editable ".[dev,triton]"
	touch $@

build: $(VENV)/installed
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .

# Without a GPU the demo has no use for CUDA kernels, which take minutes to compile; what an earlier
# build compiled stays.
demo: $(VENV)/installed
	if ! nvidia-smi -L > /dev/null 2>&1 && ! ls build/editable/*_cuda.o > /dev/null 2>&1; then \
		export PRUNELM_CUDA="$${PRUNELM_CUDA-0}"; \
	fi; \
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/prunelm demo --out runs/demo

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

test: lint
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -m "not slow"

# Python itself leaks at its end, and torch's own code is not looked at.
sanitize: build
	PRUNELM_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_WAIT_POLICY=passive PYTHONPATH=build/sanitize/lib \
	$(BIN)/pytest -q -m "not slow" $(SANITIZED:%=tests/test_%.py)

gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

bench: build
	$(BIN)/pytest -q benchmarks/test_speed.py
	$(BIN)/python -m prunelm.benchmarks.instructions

clean:
	rm -rf $(VENV) build dist prunelm/_C*.so
