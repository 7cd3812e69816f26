# Every target does everything on a fresh machine: it makes .venv, installs the tested stack into it and runs.
# A second call reuses what is there. Another interpreter or place: make test PYTHON=python3.12 VENV=/somewhere/venv
PYTHON ?= python3
VENV ?= .venv
VENV_CLASSIC ?= .venv-classic
VENV_LATEST ?= .venv-latest
VENV_OLDEST ?= .venv-oldest
VENV_DOCS ?= .venv-docs
BIN = $(VENV)/bin
READY = $(VENV)/.ready
WORK_DIR ?= work_dirs
JOBS ?= 2

.PHONY: install demo demo-seg test test-classic test-latest test-oldest lint gpu-check faults mutants test-scale gpu-scale docs docs-links clean

install: $(READY)

# $(call environment,PLACE,REQUIREMENTS): a dependency brings opencv-python over the headless build; on a machine without
# libGL only the latter imports.
define environment
@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
  { echo "the tested stack needs Python 3.10 to 3.13 (numpy below 2.3, which imaug asks for, has no wheel for 3.14)," \
    "but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.13 ..." >&2; exit 2; }
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --disable-pip-version-check -q -r $(2)
$(1)/bin/python -m pip install --disable-pip-version-check -q --no-deps -e .
@$(1)/bin/python -c 'import cv2' 2>/dev/null || $(1)/bin/python -m pip install --disable-pip-version-check -q \
  --force-reinstall --no-deps "$$(grep '^opencv-python-headless' $(2))"
@touch $(1)/.ready
endef

$(READY): requirements.txt setup.cfg pyproject.toml
	$(call environment,$(VENV),requirements.txt)

$(VENV_CLASSIC)/.ready: requirements-classic.txt setup.cfg pyproject.toml
	$(call environment,$(VENV_CLASSIC),requirements-classic.txt)

# $(call mixed,PLACE,REQUIREMENTS): an environment of REQUIREMENTS and, of requirements.txt, what those do not name.
define mixed
mkdir -p $(1)
grep -vE "^($$(sed -n 's/==.*//p' $(2) | paste -sd '|' -))==" requirements.txt | cat $(2) - > $(1)/requirements.txt
$(call environment,$(1),$(1)/requirements.txt)
endef

$(VENV_LATEST)/.ready: requirements.txt requirements-latest.txt setup.cfg pyproject.toml
	$(call mixed,$(VENV_LATEST),requirements-latest.txt)

$(VENV_OLDEST)/.ready: requirements.txt requirements-oldest.txt setup.cfg pyproject.toml
	$(call mixed,$(VENV_OLDEST),requirements-oldest.txt)

demo: $(READY)
	$(BIN)/python tools/demo.py det --work-dir $(WORK_DIR)/demo

demo-seg: $(READY)
	$(BIN)/python tools/demo.py seg --work-dir $(WORK_DIR)/demo_seg

# Processes of one thread each: make test JOBS=8 on a larger machine. Threads that wait must not hold the cores that
# others compute on.
test: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Kill a training at 40 random moments, half of them in the writing of a checkpoint, and 10 times in the saving of pieces; damage
# its checkpoints, fill its disk, and compare the end with an undisturbed run's, bit for bit; preempt jobs of two tasks, of two
# nodes and in pieces, and under mpirun where there is one, in every phase; write what was seen into docs/no_run_lost.md; then
# the tests of all that. Half an hour on two idle cores.
# As root it also fills a small tmpfs.
faults: $(READY)
	$(BIN)/python tests/faults/driver.py --kills 40 --iterations 40 --tmpfs --keep --work-dir $(WORK_DIR)/faults
	$(BIN)/python tests/faults/cluster.py --launcher srun nodes $(shell command -v mpirun > /dev/null && echo mpi) \
	  --iterations 24 --keep --work-dir $(WORK_DIR)/faults_cluster
	$(BIN)/python tests/faults/cluster.py --launcher srun --sharded --iterations 20 --keep --work-dir $(WORK_DIR)/faults_sharded
	$(BIN)/python tests/faults/sharded.py --kills 10 --keep
	$(BIN)/python tests/faults/results.py
	MILA_MM_SLOW=1 $(BIN)/python -m pytest tests/faults tests/engine/runner/test_sharding.py

# The distributed tests with four processes as well.
test-scale: $(READY)
	MILA_MM_SLOW=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/tools/test_scale.py

# The core of the suite on OpenMMLab's original packages, in an environment of its own.
test-classic: $(VENV_CLASSIC)/.ready
	OMP_WAIT_POLICY=PASSIVE $(VENV_CLASSIC)/bin/python -m pytest tests/compat/mmcv_ext tests/models/test_mila.py \
	  tests/models/test_parity.py tests/tools/test_train_test.py tests/tools/test_pretrained.py

# The core of the suite on the newest torch, in an environment of its own.
test-latest: $(VENV_LATEST)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV_LATEST)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/ops \
	  tests/models tests/nn tests/compat tests/weights

# The core of the suite on the oldest packages that setup.cfg lets in, in an environment of its own.
test-oldest: $(VENV_OLDEST)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV_OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/nn \
	  tests/models/test_mila.py tests/weights tests/engine/inference tests/export/test_files.py tests/tools/test_train_test.py

# Put faults into a copy of the package, one at a time, and see whether its tests notice: half an hour, by a seed.
mutants: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q cosmic-ray==8.7.0
	$(BIN)/python tests/mutants.py --workers $(JOBS) --minutes 30
	$(BIN)/python tests/mutants.py --docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

$(VENV_DOCS)/.ready: requirements-docs.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the documentation is built with Python 3.11 or later: make docs PYTHON=/path/to/python3.13" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/python -m pip install --disable-pip-version-check -q -r requirements-docs.txt
	@touch $@

# The site in docs/_build/html, warnings as errors, in an environment of its own: neither torch nor OpenMMLab is installed.
docs: $(VENV_DOCS)/.ready
	$(VENV_DOCS)/bin/python -m sphinx -q -E -a -W --keep-going -b html docs docs/_build/html
	$(VENV_DOCS)/bin/python tools/docs/check_reference.py docs/_build/html
	$(VENV_DOCS)/bin/python tools/docs/check_links.py docs/_build/html
	@echo "open docs/_build/html/index.html"

# The addresses that the site links to, asked one by one; needs the network.
docs-links: $(VENV_DOCS)/.ready
	$(VENV_DOCS)/bin/python -m sphinx -q -b linkcheck docs docs/_build/links

# Everything that a GPU has to show: correctness of the ops, tools/train.py, speed beside other backbones. Each step has a
# limit of time and goes on whatever became of those before; make fails unless all have run and passed. It takes the
# interpreter as it is: make gpu-check PYTHON=python3. After an interruption: make gpu-check GPU_CHECK=--resume; the whole
# of it, an hour or so: GPU_CHECK=--all; on a machine lent for eight minutes: GPU_CHECK='--patience 1 --budget 470';
# a rehearsal on a CPU: GPU_CHECK=--rehearse.
GPU_CHECK ?=
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(GPU_CHECK)

# What a GPU has to show of training: a stop under NCCL, memory, throughput of a detector against other backbones, 500 steps in each precision.
gpu-scale: $(READY)
	$(BIN)/python -m pytest -m gpu tests/faults/test_cluster.py
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.memory --docs
	$(BIN)/python -m benchmarks.tiled && $(BIN)/python -m benchmarks.tiled --docs
	$(BIN)/python -m benchmarks.detector_step
	$(BIN)/python -m benchmarks.precision_curves --out benchmarks/results/precision_curves_gpu.json \
	  --plot docs/images/precision_curves_gpu.png

clean:
	rm -rf $(VENV) $(VENV_CLASSIC) $(VENV_LATEST) $(VENV_OLDEST) $(VENV_DOCS) docs/_build docs/_generated build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
