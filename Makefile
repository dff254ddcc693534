# make demo, make test: each works on a fresh machine with Python 3.11 to 3.13 and nothing else installed.
PYTHON ?= python3
VENV := .venv
RUN := runs/demo
ACCELERATOR ?=
ifneq ($(filter-out tpu gpu,$(ACCELERATOR)),)
$(error ACCELERATOR=$(ACCELERATOR): must be tpu or gpu, or not given for the CPU)
endif
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export JAX_PLATFORMS ?=

# A step allocates over a gigabyte. By default malloc returns it each time, and the next step faults it in again, 4 KiB by
# 4 KiB; this keeps it, in huge pages. glibc only, ignored elsewhere.
demo benchmark: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=68719476736

.PHONY: demo test test-newest benchmark lint setup constraints clean

demo: $(VENV)/installed  ## pre-train a small GLM on the Python standard library, look at it, then teach it to reason
	$(VENV)/bin/python -m experiments.curate --config=configs/curate.py --output=$(RUN)/data
	$(VENV)/bin/python -m experiments.train --config=configs/tiny.py --workdir=$(RUN)/run --config.data.paths='("$(RUN)/data",)'
	$(VENV)/bin/python -m experiments.demo_report --workdir=$(RUN)/run
	@printf '\nThe inference engine answers "def read(self, ":\n\n'
	$(VENV)/bin/python -m experiments.generate --workdir=$(RUN)/run --prompt='def read(self, ' --length=64
	$(VENV)/bin/python -m experiments.cold_start --output=$(RUN)/cold_start.jsonl
	$(VENV)/bin/python -m experiments.sft --config=configs/sft_tiny.py --workdir=$(RUN)/sft --config.start.workdir=$(RUN)/run \
		--config.data.tokenizer=$(RUN)/run --config.data.paths='("$(RUN)/cold_start.jsonl",)'
	$(VENV)/bin/python -m experiments.rl --config=configs/rl_math_tiny.py --workdir=$(RUN)/rl --config.start.workdir=$(RUN)/sft
	$(VENV)/bin/python -m experiments.demo_report --workdir=$(RUN)/run --rl=$(RUN)/rl

test: $(VENV)/installed-dev  ## all tests
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

benchmark: $(VENV)/installed-dev  ## training and generation beside transformers + torch, same environment for both
	$(VENV)/bin/python -m experiments.benchmark --config=configs/bench.py
	$(VENV)/bin/python -m experiments.benchmark_generate --config=configs/bench.py --config.model.scan_layers=False

lint: $(VENV)/installed-dev  ## style and types
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python

setup: $(VENV)/installed-dev $(ACCELERATOR:%=$(VENV)/installed-%)  ## everything that tests and development need; ACCELERATOR=tpu or gpu

test-newest:  ## the tests with the newest release of everything, in an environment of their own: by hand, once a week
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

constraints:  ## pins what is installed: after a test-newest that passed, with VENV=.venv-newest
	@{ grep '^#' $(FILE); $(VENV)/bin/pip freeze | sed 's/+cpu$$//' | grep -v '^nvidia-\|^triton=\|^cuda-\|@\|^pip=\|^setuptools='; } > $(FILE).new
	mv $(FILE).new $(FILE)

# The versions that the tests passed with, by the Python of the environment.
FILE = constraints-$(shell $(VENV)/bin/python -c "import sys; print('3.11' if sys.version_info < (3, 12) else '3.13')").txt
CONSTRAINTS = -c $(FILE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt constraints-3.11.txt constraints-3.13.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet -r requirements.txt $(CONSTRAINTS)
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt constraints-3.11.txt constraints-3.13.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt $(CONSTRAINTS)
	touch $@ $(VENV)/installed

# On a TPU libtpu is the one that jax's extra names, not the pinned one.
$(VENV)/installed-tpu $(VENV)/installed-gpu: $(VENV)/installed-%: requirements-%.txt $(VENV)/installed-dev
	grep -v '^libtpu' $(FILE) > $(VENV)/constraints.txt
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt -r $< -c $(VENV)/constraints.txt
	touch $@

clean:
	rm -rf $(RUN) .cache
