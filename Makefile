# Everything a fresh machine with Python needs; safe to repeat. Override TORCH to pick another build.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
RUN := $(BIN)/python
TRITON_TESTS := tests/test_kernels.py tests/benchmarks/test_stand_in.py tests/benchmarks/test_launches.py tests/benchmarks/test_compiled.py
VERSIONS := 3.3.1 3.4.0 3.6.0 3.7.1 3.9.0
OLDEST := torch==2.6.0 einops==0.7.0 numpy==2.2.6
# test_derivatives asks for what torch.func learnt later.
OLDEST_TESTS := tests/losses tests/heads tests/noise tests/retrieval tests/compat tests/doctor/test_doctor.py tests/test_fmfa.py \
	tests/test_package.py tests/distributed/test_cached.py $(filter-out %/test_derivatives.py,$(wildcard tests/ops/test_*.py))

# A stamp that make would take for an intermediate file.
.PRECIOUS: .venv/triton-%/installed

.PHONY: demo test test-versions test-oldest lint compile-check record-compiled docs launches bench gpu-bench release-check clean help

help:
	@echo "make demo   fine-tune on rendered pedestrians and show where the pictures are"
	@echo "make test   all tests          make lint   ruff, mypy"
	@echo "make bench  time and memory of every loss on this machine"
	@echo "make docs   the site, in site/      make release-check   the archives of a release"

# pip first: it has --group from 25.1 on. torch next: a bare requirement on it would otherwise pull the newest build,
# whatever TORCH says.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[plot,noise,triton]" --group dev
	touch $@

test: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal

# Another Triton over the same environment, `make test-triton-3.6.0`: the kernels interpreted, specialised, and compiled
# for sm_90, where 3.6.0 compares with what was recorded; block tables are those of newer ones, and 3.3 and 3.4 spill
# registers in some. Its interpreter may need an older numpy; torch stays. SOME_CASES: every kernel with its masks and
# gradients, but not again at every size that `make test` has shown: that arithmetic is numpy's under either Triton.
.venv/triton-%/installed: .venv/installed
	rm -rf $(@D)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) "triton==$*" "numpy<2.4"
	touch $@

test-triton-%: .venv/triton-%/installed
	PYTHONPATH=$(CURDIR)/.venv/triton-$* SOME_CASES=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(TRITON_TESTS)
	PYTHONPATH=$(CURDIR)/.venv/triton-$* $(RUN) -m benchmarks compile-check --chip sm_90 $(if $(filter 3.3.% 3.4.%,$*),--spills) \
		$(if $(filter 3.6.0,$*),--against benchmarks/results/compiled_sm_90.json)

# After a kernel became better: the table that test-triton-3.6.0 compares with.
record-compiled: .venv/triton-3.6.0/installed
	PYTHONPATH=$(CURDIR)/.venv/triton-3.6.0 $(RUN) -m benchmarks compile-check --chip sm_90 \
		--record benchmarks/results/compiled_sm_90.json

# The oldest torch, einops and numpy beside which the losses hold, without triton: an environment of its own, of 5 GB
# where the index has no CPU build.
.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check $(OLDEST) pytest pytest-xdist hypothesis psutil
	.venv-oldest/bin/pip uninstall --quiet --yes triton
	touch $@

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist worksteal $(OLDEST_TESTS)

# All that docs/install.md says was tried. Half an hour and 10 GB: CI runs test-triton-3.6.0 of it.
test-versions: $(VERSIONS:%=test-triton-%) test-oldest

demo: .venv/installed
	$(RUN) -m benchmarks.person_retrieval train --out runs/demo --overwrite

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, with warnings as errors; the variable leaves out an advertisement.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Every kernel, compiled for every architecture of the block table, without a GPU; CHIPS="sm_90" KINDS="tf32" for some.
CHIPS ?=
KINDS ?=
compile-check: .venv/installed
	$(RUN) -m benchmarks compile-check $(if $(CHIPS),--chip $(CHIPS)) $(if $(KINDS),--kind $(KINDS))

# What a step launches, compiles, moves and allocates on a GPU; fails when a figure exceeds its limit.
launches: .venv/installed
	$(RUN) -m benchmarks launches --out docs/launches.md

# Other packages of MaxSim take part when they are there: .venv/bin/pip install --group peers
bench: .venv/installed
	$(RUN) -m benchmarks micro
	$(RUN) -m benchmarks busy

gpu-bench: .venv/installed
	$(RUN) -m benchmarks gpu --out runs/gpu

# The archives of a release: whole, the same wheel from both, tests that run in the unpacked one, and the wheel installed
# into a clean environment and used from outside the checkout, without triton and with it. TAG=v0.1.0: also its date.
TAG ?=
SAMPLE := tests/test_package.py tests/docs/test_readme.py tests/heads/test_identity.py
CLEAN := /tmp/fmfa-losses-wheel
release-check: .venv/installed
	rm -rf build dist $(CLEAN) && mkdir -p $(CLEAN)
	$(RUN) -m build --outdir dist . > /dev/null
	$(RUN) -m twine check --strict dist/*
	$(RUN) .ci/archives.py dist build/unpacked $(TAG)
	cd build/unpacked/fmfa_losses-* && $(CURDIR)/$(RUN) -m pytest -q -p no:cacheprovider --collect-only > $(CURDIR)/build/collected
	tail -1 build/collected
	cd build/unpacked/fmfa_losses-* && OMP_NUM_THREADS=1 $(CURDIR)/$(RUN) -m pytest -q -p no:cacheprovider $(SAMPLE)
	$(PYTHON) -m venv $(CLEAN)/venv
	$(CLEAN)/venv/bin/pip install --quiet --disable-pip-version-check --no-compile "$(TORCH)"
	$(CLEAN)/venv/bin/pip install --quiet --disable-pip-version-check dist/*.whl
	$(CLEAN)/venv/bin/pip uninstall --quiet --yes triton  # a CUDA build of torch brings it
	cp .ci/outside.py $(CLEAN)/ && cd $(CLEAN) && venv/bin/python outside.py
	$(CLEAN)/venv/bin/pip install --quiet --disable-pip-version-check --no-compile "$$(ls dist/*.whl)[triton]" numpy  # of its interpreter
	cd $(CLEAN) && TRITON_INTERPRET=1 venv/bin/python outside.py triton

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info
