# make demo, make test: each works on a fresh machine with Python 3.11 and nothing else installed.
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

.PHONY: demo test benchmark lint setup clean

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

lint: $(VENV)/installed-dev  ## style
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

setup: $(VENV)/installed-dev $(ACCELERATOR:%=$(VENV)/installed-%)  ## everything that tests and development need; ACCELERATOR=tpu or gpu

$(VENV)/installed: requirements.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	touch $@ $(VENV)/installed

$(VENV)/installed-tpu $(VENV)/installed-gpu: $(VENV)/installed-%: requirements-%.txt $(VENV)/installed-dev
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt -r $<
	touch $@

clean:
	rm -rf $(RUN) .cache
