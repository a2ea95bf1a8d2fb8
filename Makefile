# make bench and make test do all set-up: a virtual environment, torch, the build. What is done is not done again.
# TORCH=2.11.0 uses that version, in an environment of its own. PVK_VENV=none uses the python that is active.
# make test PVK_SIMT=0 leaves out the emulator of CUDA kernels, which needs g++; JOBS=1 runs the tests in one process.

PYTHON ?= python3
TORCH ?= 2.14.1
ONLY ?=
SAVE ?=
PVK_SIMT ?= 1
JOBS ?= 2

# torch -> torchvision; nvcc is of the CUDA release that these were built with.
VISION_2.11.0 := 0.26.0
VISION_2.14.1 := 0.29.1
TORCHVISION := $(VISION_$(TORCH))
# The interpreter of this torch's Triton converts arrays of one element to ints, which later ones refuse.
NUMPY_2.11.0 := "numpy<2.4"
NVCC_PACKAGES := nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85

VENV := .venv$(if $(filter-out 2.14.1,$(TORCH)),-$(TORCH))
ifeq ($(PVK_VENV),none)
RUN := $(PYTHON)
READY :=
CLANG_FORMAT := clang-format
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
CLANG_FORMAT := $(VENV)/bin/clang-format
endif

.PHONY: help build build-simt build-asan bench bench-full test test-full test-asan lint format aot aot-full gpu gpu-status clean

help:
	@echo "make bench       set up, build, verify, benchmark against torchvision, run a detector (10 minutes at most); SAVE=1 keeps the record"
	@echo "make test        set up, build, run the tests, the CUDA kernels too: under an emulator on the CPU"
	@echo "make test-asan   the emulator's part of the tests under AddressSanitizer and UBSan"
	@echo "make lint        ruff, clang-format, mypy; make format rewrites"
	@echo "make aot         compile every CUDA kernel for sm_80, sm_90, sm_100; registers, spills, opcodes"
	@echo "make bench-full  every benchmark; make test-full and aot-full: the slow checks too"
	@echo "make gpu         on a GPU: build, suite, compute-sanitizer, benchmarks; ONLY=op; gpu-status: what is not verified"

$(VENV)/.ready: Makefile requirements.txt
	@echo "== setting up $(VENV): torch $(TORCH), torchvision $(TORCHVISION) (about 6 GB, once)"
	@test -n "$(TORCHVISION)" || { echo "TORCH=$(TORCH) is not among the supported versions: 2.11.0 2.14.1"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check torch==$(TORCH) torchvision==$(TORCHVISION)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt $(NUMPY_$(TORCH))
	@if $(RUN) -c "import sys, setup; sys.exit(not setup.lacks_nvcc())"; then \
	  echo "== no nvcc for this torch here: installing it into $(VENV)"; \
	  $(RUN) -m pip install --quiet --disable-pip-version-check $(NVCC_PACKAGES); fi
	@touch $@

# ninja decides what is to be compiled again.
BUILD = $(RUN) setup.py --quiet build_ext --inplace
build: $(READY)
	@PVK_SIMT=0 $(BUILD)

build-simt: $(READY)
	@PVK_SIMT=$(PVK_SIMT) $(BUILD)

build-asan: $(READY)
	@PVK_SIMT=asan $(BUILD)

bench: build
	@$(RUN) -m benchmarks $(if $(ONLY),--only $(ONLY)) $(if $(SAVE),--save)

bench-full: build
	@$(RUN) -m benchmarks --full $(if $(ONLY),--only $(ONLY)) $(if $(SAVE),--save)

# Two processes share the cores: threads that wait for each other are to sleep, not to spin.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -q $(if $(filter-out 1,$(JOBS)),-n $(JOBS) --dist worksteal)
test: build-simt
	@PVK_SIMT=$(PVK_SIMT) $(PYTEST) $(if $(ONLY),-k $(ONLY))

test-full: build-simt
	@PVK_SIMT=$(PVK_SIMT) PVK_TEST_FULL=1 $(PYTEST) $(if $(ONLY),-k $(ONLY))

# Python is not built with the sanitizers, so they come first by LD_PRELOAD; libstdc++ too, for they look for its throw.
SANITIZED = PVK_SIMT=asan PVK_SIMT_SEEDS=$(or $(PVK_SIMT_SEEDS),1) \
  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
test-asan: build-asan
	@$(SANITIZED) $(PYTEST) -m simt $(if $(ONLY),-k $(ONLY))

CPP_FILES = git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh'
lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(CLANG_FORMAT) --dry-run --Werror $$($(CPP_FILES))
	@$(RUN) -m mypy

format: $(READY)
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@$(CLANG_FORMAT) -i $$($(CPP_FILES))

# After the build, whose objects hold the architectures of the library.
aot: build
	@$(RUN) tests/aot.py

aot-full: build
	@$(RUN) tests/aot.py --full

# Where torch is importable and a GPU is there: no network, no virtual environment.
ANY = $$($(PYTHON) -c "import torch, rich" 2>/dev/null && echo $(PYTHON) || echo $(RUN))
gpu:
	@ONLY=$(ONLY) $(ANY) -m benchmarks.gpu

gpu-status:
	@$(ANY) -m benchmarks.gpu_status

clean:
	rm -rf build dist *.egg-info pyvision_kernels/lib pyvision_kernels/_C.*.so
