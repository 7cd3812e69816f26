# Every target does everything on a fresh machine: it makes .venv, installs the tested stack into it and runs.
# A second call reuses what is there. Another interpreter or place: make test PYTHON=python3.12 VENV=/somewhere/venv
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
WORK_DIR ?= work_dirs

.PHONY: install demo demo-seg test lint gpu-check clean

install: $(READY)

$(READY): requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "mila_mm needs Python 3.10 to 3.12, but $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	@# A dependency brings opencv-python over the headless build; on a machine without libGL only the latter imports.
	@$(BIN)/python -c 'import cv2' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check -q \
	  --force-reinstall --no-deps "$$(grep '^opencv-python-headless' requirements.txt)"
	@touch $@

demo: $(READY)
	$(BIN)/python tools/demo.py det --work-dir $(WORK_DIR)/demo

demo-seg: $(READY)
	$(BIN)/python tools/demo.py seg --work-dir $(WORK_DIR)/demo_seg

# Threads that wait must not hold the cores that others compute on: a busy machine loses a factor otherwise.
test: $(READY)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .

# Everything that a GPU has to show: correctness of the op, then its speed. Needs torch, triton, numpy and pytest only,
# so it takes the interpreter as it is: make gpu-check PYTHON=python3
gpu-check:
	$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make gpu-check needs a CUDA device")'
	$(PYTHON) -m pytest -m gpu tests/ops/test_attention_gpu.py tests/ops/test_attention_gpu_runtime.py
	$(PYTHON) benchmarks/attention_op.py
	$(PYTHON) benchmarks/backbone.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache
