# Every target sets up what it needs in VENV, made with PYTHON. TESTS selects tests.
PYTHON ?= python3
VENV ?= .venv
TESTS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-all check figures lowest docs dist bench accelerators accelerators-check clean

# The examples at full length, about two minutes on two cores; pictures in output/.
demo: $(VENV)/.installed
	$(BIN)/python examples/language_model.py
	$(BIN)/python examples/vae.py

# Complete runs leave a report that `make figures` reads.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto $(or $(TESTS),--junit-xml=output/junit-fast.xml)

# Also the tests marked slow: kills, sweeps, several processes, statistics of the noise.
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto -m '' $(or $(TESTS),--junit-xml=output/junit-all.xml)

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Lines, refusals, import floors and seconds of the tests, each with its limit.
figures: $(VENV)/.installed
	$(BIN)/python benchmarks/figures.py

# The tests of the package under the lower bounds of its dependencies, where Flax warns.
lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -n auto tests src --ignore-glob='*test_example*' \
	  --ignore-glob='*multiprocess_job*' \
	  -W 'ignore:jax.array_ref:DeprecationWarning' -W 'ignore:jax.ArrayRef:DeprecationWarning'

# The documentation, in output/site; broken links and anchors are errors.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist in dist/, checked; then the wheel trains in an environment of its own.
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv --clear output/dist
	output/dist/bin/pip install --quiet dist/*.whl
	output/dist/bin/python -I -W error .ci/installed.py

# Speed compared with other optimizers: half an hour or more; rewrites docs/benchmarks.md.
bench: $(VENV)/.bench
	@$(BIN)/python -c 'import torch, pytorch_optimizer' 2>/dev/null || { \
	  echo 'The PyTorch optimizers are skipped. To include them:'; \
	  echo '  $(BIN)/pip install torch && $(BIN)/pip install --no-deps pytorch_optimizer'; }
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/report.py

# The step compiled for TPUs and GPUs that are not there: hours, but an interrupted run can be
# resumed; rewrites docs/accelerators.md. The environment takes 2 GB.
accelerators: .venv-accelerators/.installed
	.venv-accelerators/bin/python benchmarks/cycles.py
	.venv-accelerators/bin/python benchmarks/accelerators.py
	.venv-accelerators/bin/python benchmarks/accelerators_page.py

# One leaf of every format and rounding, against the targets of benchmarks/targets.py.
accelerators-check: .venv-accelerators/.installed
	.venv-accelerators/bin/python benchmarks/accelerators.py --check

clean:
	rm -rf .venv .venv-lowest .venv-accelerators output dist

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'adamaxw needs Python 3.11 or newer: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.bench $(VENV)/.dist: $(VENV)/.%: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

.venv-lowest/.installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint tests/lowest.txt --editable '.[test]'
	@touch $@

# The compiler for CUDA is installed without the CUDA libraries, which only a GPU needs.
.venv-accelerators/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-accelerators
	.venv-accelerators/bin/pip install --quiet 'jax[tpu]' cramjam psutil rich --editable .
	version=$$(.venv-accelerators/bin/python -c 'import jax; print(jax.__version__)') && \
	  .venv-accelerators/bin/pip install --quiet --no-deps nvidia-cuda-nvdisasm \
	  jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	@touch $@
