# make demo   the whole paper on the handwritten digits: train, resample, analyse, draw
# make test   what continuous integration runs
# make processors  the numerical tests as older processors compute, and with two threads
# make gpu    on a CUDA GPU: that it computes what a CPU does, and how fast
# make soak   the trial of what the README promises: kills, full disks, hostile files, several processes
# make oldest the tests on the oldest packages that requirements.txt admits, in .venv-oldest
# All but the last set up .venv first; a second call sets up nothing again.
# `make PYTHON=python3.12 test` picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# whatever pip and Python are told elsewhere, packages go into the environment at hand
CLEAN := env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PYTHONPATH -u PYTHONHOME
PIP := -m pip install --quiet --disable-pip-version-check --no-user
NUMERICAL := tests/rainbow tests/models tests/test_tutorial.py tests/utils/runs/test_training.py

.PHONY: demo test processors gpu soak oldest

demo: $(READY)
	$(BIN)/python run_exps.py --scale laptop
	$(BIN)/python -m utils.figures --scale laptop --recompute

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy rainbow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

processors: $(READY)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n 2 $(NUMERICAL)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n 2 $(NUMERICAL)
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(NUMERICAL)

gpu: $(READY)
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_cuda.py
	$(BIN)/python benchmarks/gpu.py

soak: $(READY)
	$(BIN)/python -m pytest -m soak -n 2 tests/soak

oldest:
	$(CLEAN) $(PYTHON) -m venv .venv-oldest
	sed 's/>=/==/' requirements.txt > .venv-oldest/requirements.txt
	$(CLEAN) .venv-oldest/bin/python $(PIP) -r .venv-oldest/requirements.txt -r requirements-dev.txt
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -p no:cacheprovider

$(READY): requirements.txt requirements-dev.txt
	$(CLEAN) $(PYTHON) -m venv .venv
	$(CLEAN) $(BIN)/python $(PIP) -r requirements-dev.txt
	$(CLEAN) $(BIN)/python -m pip freeze --local | grep -q . || { echo "nothing was installed into .venv" >&2; exit 1; }
	touch $@
