# demo: train the digits example under two strategies.   test: everything that CI runs.
# test-all: the same, the slow tests, minutes of drawn trainings, and more kills.
# chaos: faults of every kind, on real processes, an hour.   soak: random ones, three quarters.
# check: format, lint, types.   fmt: mend format and lint.   bench: compare with peers.
# Each target does all the set-up it needs, on a fresh machine too.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

DRAWN := $(addprefix tests/unit/test_,\
	property_training.py leased_tables.py embedding_losses.py async_shard.py)

# Ray's memory monitor counts the memory of all processes, so no other test may run.
OUT_OF_MEMORY := tests/cluster/test_out_of_memory.py

# Three, for two cores: tests in memory wait for each other's threads a third of their time.
IN_MEMORY := -n 3 --dist loadfile --max-worker-restart 1
NEW_EXAMPLES := --hypothesis-profile "new examples"
ON_RAY := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 1 -ra
# Images for containers often set it: each process of a run would then compile distplat anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all chaos soak check fmt bench clean

demo: $(VENV)/.installed
	$(BIN)/distplat submit examples/digits/job.yaml
	$(BIN)/distplat submit examples/digits/job.yaml --strategy ring

test: check
	$(BIN)/python -m pytest $(IN_MEMORY) -m "not slow" tests/unit
	$(BIN)/python -m pytest $(ON_RAY) -m "not slow" tests/cluster tests/gpu

test-all: test $(VENV)/.installed-all
	$(BIN)/python -m pytest $(IN_MEMORY) -m slow tests/unit
	$(BIN)/python -m pytest $(ON_RAY) -m slow tests/cluster --ignore $(OUT_OF_MEMORY)
	$(BIN)/python -m pytest $(OUT_OF_MEMORY)
	$(BIN)/python -m pytest tests/unit/test_from_pages.py tests/unit/test_trackers.py tests/unit/test_gcs.py
	$(BIN)/python -m pytest $(IN_MEMORY) $(NEW_EXAMPLES) -m hypothesis tests/unit
	DISTPLAT_DRAWN_RUNS=1000 $(BIN)/python -m pytest --timeout 3000 -o faulthandler_timeout=3300 $(NEW_EXAMPLES) $(DRAWN)
	DISTPLAT_KILLS=20 $(BIN)/python -m pytest tests/cluster/test_kill_inside.py

chaos: $(VENV)/.installed
	$(BIN)/python tests/chaos/chaos_grid.py

soak: $(VENV)/.installed
	$(BIN)/python tests/chaos/chaos_memory.py --minutes 15
	$(BIN)/python tests/chaos/chaos_soak.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/ps_step.py
	$(BIN)/python benchmarks/stragglers.py
	$(BIN)/python benchmarks/sparse.py
	$(BIN)/python benchmarks/all_reduce.py
	$(BIN)/python benchmarks/ring_step.py
	$(BIN)/python benchmarks/step_overhead.py
	for s in ring ps-sync ps-async; do $(BIN)/python benchmarks/train_function.py --strategy $$s || exit; done
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/compression.py
	$(BIN)/python benchmarks/tensor_parallel.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/shard_recovery.py
	$(BIN)/python benchmarks/submit_latency.py

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "distplat needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[bench]'
	@touch $@

# Trackio 0.43 wants an older pillow than the one that the tests run with: its test is skipped.
$(VENV)/.installed-all: $(VENV)/.installed-bench
	$(PIP) -e '.[gcs,mlflow,wandb]' gcp-storage-emulator
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
