# Everything from nothing: `make demo`, `make test`. Needs Python >= 3.10, a C++ compiler and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml constraints.txt

.PHONY: demo test test-slow lint format bench claims clean

# An isolated build would resolve torch anew; this builds against the one just installed.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 ninja numpy torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m 'not slow and not gpu'

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m 'slow'

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench_step.py

claims: $(INSTALLED)
	$(BIN)/python examples/claims/run.py

clean:
	rm -rf build dist *.egg-info lightning_optkit/*.so $(INSTALLED)
