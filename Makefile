# make demo    build, quantize the bundled model, serve it, ask it a question, show speed and metrics
# make test    environment from nothing, build with warnings as errors, every test but gpu and slow
# make test-all, make lint, make format, make clean
#
# VENV=        use the current interpreter and install nothing (a machine without network)
# TORCH=...    another torch requirement, e.g. TORCH=torch for a CUDA build of it

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
ENVIRONMENT :=
else
PY := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.installed
endif

.PHONY: demo test test-all test-cpp build lint format clean platform
demo: export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))
test test-all: export PYTHONPATH := $(CURDIR)$(addprefix :,$(PYTHONPATH))

platform:
	@$(PYTHON) .ci/check_platform.py

# The environment: torch and the build tools, then what pyproject.toml names.
$(VENV)/.installed: pyproject.toml | platform
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip
	$(VENV)/bin/python -m pip install -q "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" ninja numpy
	$(VENV)/bin/python .ci/requirements.py > $(VENV)/requirements.txt
	$(VENV)/bin/python -m pip install -q -r $(VENV)/requirements.txt
	touch $@

# FASTGPT_CUDA follows the environment: auto compiles every .cu where nvcc is found.
build: platform $(ENVIRONMENT)
ifneq ($(strip $(VENV)),)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
else
	$(PY) setup.py -q build_ext --inplace
endif

# Kernels for the visible device, or none.
demo: platform $(ENVIRONMENT)
	if capability=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) && [ -n "$$capability" ]; then
	    export FASTGPT_CUDA=$${FASTGPT_CUDA:-auto}
	    export TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-$${capability/9.0/9.0a}}
	    echo "demo: NVIDIA device of compute capability $$capability; building its kernels"
	else
	    export FASTGPT_CUDA=$${FASTGPT_CUDA:-0}
	    echo "demo: no NVIDIA device; building for the CPU"
	fi
	$(MAKE) --no-print-directory build
	$(PY) benchmarks/demo.py

test: export FASTGPT_WERROR := 1
test: platform $(ENVIRONMENT)
	$(MAKE) --no-print-directory build test-cpp
	$(PY) -m pytest -m "not gpu and not slow"

test-all: export FASTGPT_WERROR := 1
test-all: platform $(ENVIRONMENT)
	$(MAKE) --no-print-directory build test-cpp
	$(PY) -m pytest -m "not gpu"

# The core alone, without torch or Python, with its own tests.
test-cpp:
	if ! command -v cmake >/dev/null; then
	    echo "test-cpp: cmake not found; the C++ tests were not run (apt install cmake libgtest-dev)"
	elif ! echo '#include <gtest/gtest.h>' | $${CXX:-g++} -fsyntax-only -x c++ - 2>/dev/null; then
	    echo "test-cpp: GoogleTest not found; the C++ tests were not run (apt install libgtest-dev)"
	else
	    cmake -S cmake -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTGPT_WERROR=ON \
	        -DCMAKE_MAKE_PROGRAM="$$($(PY) -c 'import ninja, os; print(os.path.join(ninja.BIN_DIR, "ninja"))')" >build-cmake.log 2>&1 \
	        || { cat build-cmake.log; exit 1; }
	    rm -f build-cmake.log
	    cmake --build build/cmake
	    ctest --test-dir build/cmake --output-on-failure
	fi

lint: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))typos
	find csrc tests/cpp benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(dir $(PY))clang-format --dry-run -Werror

format: $(ENVIRONMENT)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	find csrc tests/cpp benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(dir $(PY))clang-format -i

clean:
	rm -rf build dist fastgpt/*.so fastgpt_optimizer.egg-info
