# Every target makes what it needs, the virtual environment included; a second call installs nothing.
# Another torch: make TORCH=torch==2.12.0 (after make clean).

TORCH  ?= torch==2.13.0
TRITON ?= triton==3.9.0
PYTHON ?= python3

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

TRL := "trl==1.16.0" "accelerate>=1.15" "datasets>=5" "transformers>=5"

# The oldest Triton that is supported, whose interpreter needs a NumPy before 2.4.
OLDEST_TRITON ?= triton==3.6.0 "numpy>=1.26,<2.4"
OLDEST_VENV   := .venv-triton-3.6

NATIVE := setup.py $(shell find csrc -name "*.cpp" -o -name "*.cu" -o -name "*.h" -o -name "*.py")

# Of a wheel: a version such as 13.0, none (the CPU kernels alone) or python (no native library).
CUDA ?= 13.0

.PHONY: demo test test-full test-triton-3.6 cuda-build lint sanitize bench bench-full gpu-check wheel wheels \
	check-wheels clean

demo: $(STAMP)
	$(BIN)/python -m examples.distill --output demo

# Some tests take minutes: a worker that is done takes what another has before it.
PARALLEL := -n auto --dist worksteal

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

test-full: $(VENV)/.integrations
	MLOT_TEST_FULL=1 $(BIN)/python -m pytest $(PARALLEL)
	MLOT_TEST_FULL=1 $(MAKE) test-triton-3.6

# The Triton kernels alone, interpreted and compiled ahead of time; MLOT_TEST_FULL=1 for all of it.
test-triton-3.6: $(OLDEST_VENV)/.installed
	$(OLDEST_VENV)/bin/python -m pytest $(PARALLEL) tests/triton

# nvcc into the environment, where there is none: the next target builds the CUDA kernels, which no GPU is needed for.
cuda-build: $(VENV)/.cuda-build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files "*.h" "*.cpp" "*.cu")
	$(BIN)/mypy

# The C++ under the address, undefined-behaviour and thread sanitizers.
sanitize: $(STAMP)
	$(BIN)/python -m tests.native.sanitize

bench: $(VENV)/.bench
	$(BIN)/python -m bench

bench-full: $(VENV)/.bench
	$(BIN)/python -m bench --suite full

# Everything that needs a GPU, on a machine that has torch, triton and pytest already: no network, no environment of its own.
OUT        ?= bench/results/gpu-check
GPU_PYTHON ?= python3

gpu-check:
	$(GPU_PYTHON) -m bench.gpu_check --out $(OUT)

# Into dist/<variant>; wheels builds all variants that we publish.
wheel: $(VENV)/.wheels
	$(BIN)/python -m wheels.build --cuda $(CUDA)

wheels: $(VENV)/.wheels
	$(BIN)/python -m wheels.build

check-wheels: $(VENV)/.wheels
	$(BIN)/python -m wheels.check

# torch comes first and pinned: whatever depends on it must find it, or pip brings the newest one with gigabytes of CUDA.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" "$(TRITON)" \
		"setuptools>=77,<82" "ninja>=1.11,<2" "pybind11>=2.12,<4"
	touch $@

$(STAMP): $(VENV)/.torch pyproject.toml $(NATIVE)
	MLOT_PROBE=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[demo,test,lint]"
	touch $@

$(VENV)/.cuda-build: $(VENV)/.torch
	MLOT_NATIVE=0 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[cuda-build]"
	rm -f $(STAMP)
	touch $@

$(OLDEST_VENV)/.installed:
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	$(OLDEST_VENV)/bin/python -m pip install -q --disable-pip-version-check $(OLDEST_TRITON) pytest pytest-xdist "scipy>=1.11"
	touch $@

$(VENV)/.wheels: $(VENV)/.torch
	$(BIN)/python -m pip install -q --disable-pip-version-check "rich>=13"
	touch $@

$(VENV)/.bench: $(STAMP)
	MLOT_PROBE=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[bench]"
	touch $@

# What the adapters are tested against. Liger itself, but not what it asks for: torch and Triton are there.
$(VENV)/.integrations: $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TRL)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps liger-kernel==0.8.5
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist demo *.egg-info mlot_kernels/*.so mlot_kernels/_build.json
