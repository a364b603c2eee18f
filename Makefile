# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`. Each makes .venv by itself.
# editable_mode=compat puts this folder on the path, so that a folder of the same name above it cannot hide the package.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint check clean

demo: $(STAMP)
	$(BIN)/fxrpg demo --out build/demo

# The kernels' tests run in a process of their own: Triton's interpreter must be chosen before Triton is imported.
# On a GPU, plain `pytest` runs all of them there.
test: $(STAMP)
	$(BIN)/python -m pytest -m "not kernels"
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m kernels

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
