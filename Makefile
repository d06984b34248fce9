# Everything sets itself up in a virtual environment of its own; Python 3.11 or newer is all that is needed.
#   make demo          train the same model twice, plain and compressed; table and picture in runs/demo/
#   make test          the whole test suite
#   make docs          the documentation as a site, in site/
#   make dist          what is published, in dist/: a source distribution, a wheel with kernels and one without
#   make bench         the speed measurements behind docs/performance.md (ten minutes; leave the machine alone)
#   make bench-quality perplexities of two tasks of docs/quality.md (hours on two cores; continues where it stopped)
# `make TORCH=torch demo` takes the newest torch with CUDA instead of the CPU build of the tested version.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test docs dist bench bench-quality clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo/run.py

# Two workers of one thread each; a file to a worker, because the tests of a file share the processes they spawn.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheels are built from the source distribution, so what it lacks is noticed. The second command makes it once more.
dist: $(VENV)/.build
	rm -rf dist
	LIGHTNING_SKETCH_REQUIRE_KERNELS=1 $(BIN)/python -m build
	LIGHTNING_SKETCH_NO_KERNELS=1 $(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.speed --groups bandwidth,offload_table,offload_decoder --threads 1,2 \
		--out benchmarks/results/speed_offload.json
	$(BIN)/python -m benchmarks.speed_tables

bench-quality: $(VENV)/.benchmark
	$(BIN)/python -m benchmarks.sparse_lm --workers 2
	$(BIN)/python -m benchmarks.tied_transformer --workers 2
	$(BIN)/python -m benchmarks.make_tables

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/pip install $(TORCH)
	touch $@

$(VENV)/.build: | $(BIN)/python
	$(BIN)/pip install build twine
	touch $@

# Tests without the compiled kernels would test half of it, and there would be nothing to measure.
$(VENV)/.test $(VENV)/.bench: export LIGHTNING_SKETCH_REQUIRE_KERNELS = 1

$(VENV)/.%: $(VENV)/.torch pyproject.toml setup.py $(wildcard lightning_sketch/kernels/csrc/*)
	$(BIN)/pip install -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
