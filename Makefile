# make demo    build, quantize the bundled model, serve it, ask it a question, show speed and metrics
# make test    environment from nothing, build with warnings as errors, every test but gpu and slow
# make test-all, make sanitize, make lint, make format, make clean
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

.PHONY: demo test test-all test-cpp sanitize build lint format clean platform
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
	@if capability=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) && [ -n "$$capability" ]; then
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
	$(MAKE) --no-print-directory sanitize

# What the two targets below share.
define CPP_TESTS
make_ninja=$$($(PY) -c 'import ninja, os; print(os.path.join(ninja.BIN_DIR, "ninja"))')
has_cpp_tests() {
    if ! command -v cmake >/dev/null; then
        echo "$$1: cmake not found; the C++ tests were not run (apt install cmake libgtest-dev)"; return 1
    elif ! echo '#include <gtest/gtest.h>' | $${CXX:-g++} -fsyntax-only -x c++ - 2>/dev/null; then
        echo "$$1: GoogleTest not found; the C++ tests were not run (apt install libgtest-dev)"; return 1
    fi
}
build_cpp_tests() {  # FOLDER OPTION...
    mkdir -p "$$1"
    cmake -S cmake -B "$$@" -G Ninja -DCMAKE_MAKE_PROGRAM="$$make_ninja" >"$$1/configure.log" 2>&1 \
        || { cat "$$1/configure.log"; return 1; }
    cmake --build "$$1"
}
endef

# The core alone, without torch or Python, with its own tests.
test-cpp:
	$(CPP_TESTS)
	if has_cpp_tests $@; then
	    build_cpp_tests build/cmake -DCMAKE_BUILD_TYPE=Release -DFASTGPT_WERROR=ON
	    ctest --test-dir build/cmake --output-on-failure
	fi

# Addresses and undefined behaviour: the C++ tests, then the CPU ops and the pool from Python, with
# the runtimes loaded before Python's. Threads: the C++ tests, unrandomized (TSan's shadow is fixed).
sanitize: $(ENVIRONMENT)
	$(CPP_TESTS)
	for kind in address,undefined thread; do
	    if ! echo 'int main() {}' | $${CXX:-g++} -fsanitize=$$kind -x c++ - -o /dev/null 2>/dev/null; then
	        echo "sanitize: $${CXX:-g++} has no -fsanitize=$$kind; not run"
	    elif has_cpp_tests $@; then
	        build_cpp_tests build/sanitize-$${kind%%,*} -DFASTGPT_SANITIZE=$$kind -DFASTGPT_BENCHMARKS=OFF
	        setarch -R ctest --test-dir build/sanitize-$${kind%%,*} --output-on-failure
	    fi
	done
	if [ "$$(basename $${CXX:-g++})" = g++ ] && [ -e "$$(g++ -print-file-name=libasan.so)" ]; then
	    FASTGPT_SANITIZE=address,undefined FASTGPT_CUDA=0 $(PY) setup.py -q build --build-lib build/sanitize-python
	    PYTHONPATH=build/sanitize-python ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    $(PY) -P -m pytest -q -m "not gpu and not slow" -k "not opcheck and not compile" tests/python/ops tests/python/test_memory.py tests/python/memory/test_pool_trace.py \
	        "tests/python/memory/test_pool_model.py::test_pool_agrees_with_its_model[0]"
	else
	    echo "sanitize: no g++ with libasan; the ops were not run"
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
