# Two commands are enough: `make demo` and `make test`; `make vision`, `make text` and `make tune` run the other
# examples, `make study-movies` and the like the studies behind them. Each sets up all it needs; a second run starts at
# once. Python 3.11 or newer and make must be there.

PYTHON ?= python3
VENV := .venv
BENCH := .venv-benchmarks
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TFRS := TF_USE_LEGACY_KERAS=1 KERAS_BACKEND=tensorflow
PYTEST := $(BIN)/python -m pytest -n 2
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo vision text tune study-movies study-images study-text study-tune benchmarks benchmarks-table router-table hooks check test test-everywhere lint docs notebooks test-jax test-tensorflow test-torch test-tfrs test-once test-docs test-extras test-lowest constraints clean

demo: $(VENV)/.demo
	$(TFRS) $(BIN)/python examples/recommend_movies.py

# On JAX unless the caller chooses: it compiles and trains these small models fastest on a CPU.
vision text tune study-images study-text study-tune notebooks: export KERAS_BACKEND ?= jax

vision: $(VENV)/.demo
	$(BIN)/python examples/image_classification_vit_moe.py

text: $(VENV)/.demo
	$(BIN)/python examples/text_switch_transformer.py

tune: $(VENV)/.demo
	$(BIN)/python examples/tune_moe.py

# Several seeds, intervals and baselines: `make study-text ARGS="--seeds 5"`.
study-movies: $(VENV)/.demo
	$(TFRS) $(BIN)/python examples/studies/movies.py $(ARGS)

study-images study-text study-tune: study-%: $(VENV)/.demo
	$(BIN)/python examples/studies/$*.py $(ARGS)

# Beside other libraries' layers, which are installed apart: `make benchmarks ARGS="--backend jax"`.
benchmarks: $(BENCH)/.done
	$(BENCH)/bin/python -m benchmarks.run $(ARGS)

benchmarks-table: $(VENV)/.dev
	$(BIN)/python -m benchmarks.table

# Which checks every router passes on which backend, in docs/routers.md.
router-table: $(VENV)/.dev
	$(BIN)/python -m tests.router_checks

# Before each commit what `make lint` checks, of what changed; and the commit's subject.
hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

# The short loop: what most mistakes turn red, on the backend that compiles nothing, and the bridge.
CHECK_TESTS := tests/dispatch tests/parity tests/routers tests/layers/test_contract.py \
	tests/layers/test_idle_experts.py tests/layers/test_traps.py \
	tests/layers/test_values_and_gradients.py tests/tuning/test_active_cost.py \
	tests/tuning/test_active_flops.py tests/tuning/test_active_parameters.py \
	tests/tuning/test_check_project.py

# Two workers whose PyTorch takes two threads each wait for each other: the examples' tests took four times as long.
check test-torch: export OMP_NUM_THREADS ?= 1
check: lint
	KERAS_BACKEND=torch $(PYTEST) $(CHECK_TESTS)
	$(TFRS) $(PYTEST) tests/integrations/test_tfrs.py -k "loss or frozen or flag"

test: lint docs test-jax test-tensorflow test-torch test-tfrs test-once

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m benchmarks.table --check

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

# Runs the notebooks of docs/notebooks and stores their outputs, which the documentation shows.
notebooks: $(VENV)/.dev
	$(BIN)/python -m tests.docs.notebooks

# Once per backend, each in a process of its own. What no backend can break alone runs on PyTorch only, which
# compiles nothing (the marker `one_backend`); `make test-everywhere` runs all on all.
CORE_TESTS := tests/callbacks tests/dispatch tests/layers tests/models tests/multitask tests/optimizers tests/oracle tests/parity \
	tests/plots tests/reporting tests/routers tests/tuning

# Most of a test's time goes into compiling small programs. So LLVM does not optimise them, XLA still does, and JAX
# takes those that it knows from a run before. The benchmarks' tests compile as users do.
test-jax test-tensorflow test-docs: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
test-jax test-docs: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
test-jax test-docs: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

test-jax test-tensorflow test-torch: test-%: $(VENV)/.dev
	KERAS_BACKEND=$* $(PYTEST) $(CORE_TESTS) $(ARGS)

test-everywhere: $(VENV)/.dev
	$(MAKE) test-jax test-tensorflow test-torch ARGS="--everything tests/examples"

# What lives in Keras 2 needs its own environment.
test-tfrs: $(VENV)/.dev
	$(TFRS) $(PYTEST) tests/integrations tests/examples/test_recommend_movies.py \
		tests/examples/studies/test_movies_study.py

# What does not depend on the backend, or starts a process per backend itself, whose tests share what it has found: by
# file, so that two workers do not start it twice. The examples and studies that are not of Keras 2 run on PyTorch,
# which compiles nothing.
test-once: $(VENV)/.dev test-docs
	KERAS_BACKEND=jax $(PYTEST) --dist loadfile tests/benchmarks tests/cross_backend tests/distribution tests/packaging
	OMP_NUM_THREADS=1 KERAS_BACKEND=torch $(PYTEST) tests/examples

# The code of pages and docstrings, which calls layers operation by operation.
test-docs: $(VENV)/.dev
	KERAS_BACKEND=jax $(PYTEST) tests/docs

# Each extra in an environment of its own, which is made and deleted: `make test-extras ARGS="tuner plot"`.
test-extras: $(VENV)/.dev
	$(BIN)/python -m tests.packaging.extras $(ARGS)

# At the lowest versions that pyproject.toml claims, one backend at a time: `make test-lowest ARGS=jax`.
test-lowest: $(VENV)/.dev
	$(BIN)/python -m tests.packaging.lowest $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# Pinned versions: a set-up a year from now is the one that passed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[examples,jax]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/.demo

$(BENCH)/.done: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install -c constraints.txt hatchling editables
	$(BENCH)/bin/python -m pip install -c constraints.txt --no-build-isolation \
		-e '.[tensorflow,jax,torch,plot]' rich
	$(BENCH)/bin/python -m pip install -c constraints.txt -r benchmarks/requirements.txt
	touch $@

constraints: $(VENV)/.dev
	(echo "# The versions that passed, for Python 3.11 on Linux. Written by 'make constraints'."; \
	 $(BIN)/python -m pip freeze --all --exclude-editable \
	 | grep -v '^pip==' | sed 's/+cpu$$//') > constraints.txt

clean:
	rm -rf $(VENV) $(BENCH) build dist site results .jax_cache .cache
