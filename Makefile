# make demo | make check | make test | make install: each does its own set-up in .venv from requirements.lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNEL := $(shell find detr/msda detr/winograd distill/losses/native -name '*.hpp' -o -name '*.cpp')

.PHONY: install bindings demo check test fuzz lint lock gpu-check gpu-carry clean
.DELETE_ON_ERROR:

install: $(VENV)/installed

$(VENV)/locked: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	touch $@

$(VENV)/installed: $(VENV)/locked pyproject.toml CMakeLists.txt $(KERNEL)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

demo: install
	$(BIN)/detr demo

# One process per core; tests of one file stay together and share what their fixtures made.
PYTEST := $(BIN)/python -m pytest -q -n logical --dist loadfile

# For every save: minutes.
check: install lint
	$(PYTEST) -m "not slow"

test: install lint
	-$(MAKE) bindings
	$(PYTEST) --durations=25

# Python bindings of TensorRT and CUDA by release (several hundred MB); the tests that need them skip without.
bindings: install
	$(BIN)/python tools/bindings.py

# Files of any content, 10,000 of each kind; `make test` tries a few.
fuzz: install
	DETR_FUZZ=10000 $(PYTEST) tests/test_fuzz_files.py tests/data/test_fuzz.py tests/distill/test_recipe_values.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Everything that needs a GPU; writes docs/measured/gpu-DATE.json. BUNDLES="a.bundle b.bundle".
gpu-check: install
	$(BIN)/python -m tools.gpu_check $(BUNDLES)

# The same for a machine that has torch and no package index: build/gpu-check.tar.gz for CARRY_PYTHON.
CARRY_PYTHON ?= 3.12
gpu-carry: install
	$(BIN)/python -m tools.gpu_check.carry --python $(CARRY_PYTHON) $(BUNDLES)

# Needs uv (https://docs.astral.sh/uv/); one lock for every Python and machine the project supports.
lock:
	uv pip compile --universal --python-version 3.10 --extra train --extra dev --generate-hashes \
	  --no-header --constraint constraints.txt pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build runs
