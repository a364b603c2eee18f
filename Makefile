# Two commands on a fresh machine with Python >= 3.11: `make demo` and `make test`. Each makes .venv by itself.
# `make zoo` tries real models of other packages, in an environment of its own.
# editable_mode=compat puts this folder on the path, so that a folder of the same name above it cannot hide the package.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ZOO_BIN := .venv-zoo/bin
ZOO_STAMP := .venv-zoo/.installed
INSTALL := -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat
# such as --third, or --only 'timm.*'
ZOO ?=
# such as --only 'ResNet-20*', or --out build/bench
BENCH ?=

.PHONY: demo test bench zoo lint check clean

demo: $(STAMP)
	$(BIN)/fxrpg demo --out build/demo

# The kernels' tests run in a process of their own: Triton's interpreter must be chosen before Triton is imported.
# On a GPU, plain `pytest` runs all of them there.
test: $(STAMP)
	$(BIN)/python -m pytest -m "not kernels and not zoo"
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m "kernels and not zoo"

# Time and memory on this machine's CPU, against the dense model and the authors' way.
bench: $(STAMP)
	$(BIN)/python bench/cpu.py $(BENCH)

# Only files with such tests are given: others import what is not installed there.
zoo: $(ZOO_STAMP)
	$(ZOO_BIN)/python bench/zoo/run.py $(ZOO)
	files=$$(grep -l 'pytest\.mark\.zoo' tests/test_*.py); test -z "$$files" || $(ZOO_BIN)/python -m pytest -m zoo $$files

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

$(ZOO_STAMP): pyproject.toml bench/zoo/constraints.txt
	$(PYTHON) -m venv .venv-zoo
	$(ZOO_BIN)/python $(INSTALL) --constraint bench/zoo/constraints.txt --editable '.[zoo]'
	touch $@

clean:
	rm -rf .venv .venv-zoo build dist *.egg-info
