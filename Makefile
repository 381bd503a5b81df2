# make demo   a simulated scan becomes an image while it runs (about two minutes)
# make test   lint, types, layers and tests (at most ten minutes on two cores)
# make docs   the documents as a site, in site/index.html

PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

# A test that fails once more fails; one that passes then is listed as RERUN, a fault to be looked into.
PYTEST := $(BIN)/python -m pytest --reruns 1 -raR

.PHONY: demo docs test test-interop test-long fuzz lint bench bench-compare pretrain pictures chromium prometheus setup constraints clean

setup: .venv/installed

PIP_INSTALL := python -m pip install --quiet --constraint constraints.txt

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) --upgrade pip
	$(BIN)/$(PIP_INSTALL) --editable '.[dev]'
	touch $@

.venv/interop: .venv/installed
	$(BIN)/$(PIP_INSTALL) --editable '.[dev,interop]'
	touch $@

.venv/docs: .venv/installed
	$(BIN)/$(PIP_INSTALL) --editable '.[dev,docs]'
	touch $@

# tickit-devices needs another cbor2 than we do.
.venv-tickit/installed:
	$(PYTHON) -m venv .venv-tickit
	.venv-tickit/bin/python -m pip install --quiet 'tickit-devices==0.4.1' 'cbor2<6'
	touch $@

# They open our files in tests. What they really need is in the tests' environment already; the rest
# of what they ask for (a GUI, language models, another torch) is not.
.readers/installed: .venv/interop
	$(BIN)/$(PIP_INSTALL) --no-deps --target .readers 'ptychodus==1.7.0' 'cdtools-py==0.3.2'
	touch $@

demo: .venv/installed
	$(BIN)/ptycho-stream demo

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -n 2 --dist loadfile --ignore tests/interop -m 'not interop and not slow and not long' --durations=25

test-interop: .venv/interop .venv-tickit/installed .readers/installed chromium prometheus
	$(PYTEST) -n 2 --dist loadfile --ignore tests/interop -m 'slow and not long' --durations=25
	$(PYTEST) -m 'interop and not long' --durations=25

# Debian's programs for these tests; without one its tests are skipped and say so.
chromium prometheus:
	command -v $@ >/dev/null || apt-get install -y --no-install-recommends $@ \
		|| { apt-get update && apt-get install -y --no-install-recommends $@; } \
		|| echo "no $@: its tests are skipped"

# The screenshots in the documents.
pictures: .venv/interop chromium
	$(BIN)/python -m pytest tests/interop/test_browser.py --update-pictures

test-long: .venv/interop
	$(BIN)/python -m pytest -m long

# A million mutated messages for every codec (about half an hour on one core).
fuzz: .venv/installed
	$(BIN)/$(PIP_INSTALL) --editable '.[dev,fuzz]'
	PYTHONPATH=tests $(BIN)/python tests/fuzz.py

bench: .venv/interop
	$(BIN)/python benchmarks/suite.py --out out/bench/figures.json

# What make bench found, beside the figures that are kept.
bench-compare: .venv/installed
	$(BIN)/python benchmarks/suite.py --compare docs/benchmarks/baseline.json out/bench/figures.json

# The recipe of the shipped weights in one run (docs/models.md); 140 minutes on two cores.
pretrain: .venv/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/ptycho-stream models pretrain mine --registry out/models --minutes 140 --threads 2 --work out/pretrain

# The newest versions that pyproject.toml lets in, as those to test and install with (CONTRIBUTING.md).
constraints:
	$(PYTHON) -m venv --clear out/constraints
	out/constraints/bin/python -m pip install --quiet --upgrade pip
	out/constraints/bin/python -m pip install --quiet '.[dev,fuzz,interop]'
	{ sed -n '/^#/p' constraints.txt; \
	  out/constraints/bin/python -m pip freeze --all --exclude ptycho-stream | sed 's/+.*//'; \
	} > out/constraints/constraints.txt
	mv out/constraints/constraints.txt constraints.txt

clean:
	rm -rf .venv .venv-tickit .readers build out site *.egg-info
