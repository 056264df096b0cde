# make demo   the whole paper on the handwritten digits: train, resample, analyse, draw
# make test   what continuous integration runs
# make soak   the trial of what the README promises: kills, full disks, hostile files, several processes
# make oldest the tests on the oldest packages that requirements.txt admits, in .venv-oldest
# All but the last set up .venv first; a second call sets up nothing again.
# `make PYTHON=python3.12 test` picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test soak oldest

demo: $(READY)
	$(BIN)/python run_exps.py --scale laptop
	$(BIN)/python -m utils.figures --scale laptop --recompute

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rainbow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

soak: $(READY)
	$(BIN)/python -m pytest -m soak -n 2 tests/soak

oldest:
	$(PYTHON) -m venv .venv-oldest
	sed 's/>=/==/' requirements.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet -r .venv-oldest/requirements.txt -r requirements-dev.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -p no:cacheprovider

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
