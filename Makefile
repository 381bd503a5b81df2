# make demo   a simulated scan becomes an image while it runs (about two minutes)
# make test   lint, types, layers and tests (at most ten minutes on two cores)

PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-interop test-long fuzz lint bench pretrain chromium prometheus setup clean

setup: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

.venv/interop: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,interop]'
	touch $@

# tickit-devices needs another cbor2 than we do.
.venv-tickit/installed:
	$(PYTHON) -m venv .venv-tickit
	.venv-tickit/bin/python -m pip install --quiet 'tickit-devices==0.4.1' 'cbor2<6'
	touch $@

# They open our files in tests. What they really need is in the tests' environment already; the rest
# of what they ask for (a GUI, language models, another torch) is not.
.readers/installed: .venv/interop
	$(BIN)/python -m pip install --quiet --no-deps --target .readers 'ptychodus==1.7.0' 'cdtools-py==0.3.2'
	touch $@

demo: .venv/installed
	$(BIN)/ptycho-stream demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not interop and not slow and not long' --durations=25

test-interop: .venv/interop .venv-tickit/installed .readers/installed chromium prometheus
	$(BIN)/python -m pytest -m 'interop or slow' --durations=25

# Debian's programs for these tests; without one its tests are skipped and say so.
chromium prometheus:
	command -v $@ >/dev/null || apt-get install -y --no-install-recommends $@ \
		|| { apt-get update && apt-get install -y --no-install-recommends $@; } \
		|| echo "no $@: its tests are skipped"

test-long: .venv/interop
	$(BIN)/python -m pytest -m long

# A million mutated messages for every codec (about half an hour on one core).
fuzz: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,fuzz]'
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py

bench: .venv/interop
	$(BIN)/python benchmarks/ingest.py
	$(BIN)/python benchmarks/live.py

# The recipe of the shipped weights in one run (docs/models.md); 140 minutes on two cores.
pretrain: .venv/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/ptycho-stream models pretrain mine --registry out/models --minutes 140 --threads 2 --work out/pretrain

clean:
	rm -rf .venv .venv-tickit .readers build out *.egg-info
