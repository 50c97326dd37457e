# Everything runs in VENV, which is made with PYTHON when it is first needed; TESTS chooses tests.
PYTHON ?= python3
VENV ?= .venv
TESTS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-all check figures lowest docs bench accelerators accelerators-check clean

# The optimizer at work on real input: about two minutes on two cores; pictures in output/.
demo: $(VENV)/.installed
	$(BIN)/python examples/language_model.py
	$(BIN)/python examples/vae.py

# Complete runs leave a report, from which `make figures` takes their seconds.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto $(or $(TESTS),--junit-xml=output/junit-fast.xml)

# Also what is marked slow: kills, sweeps, several processes, statistics of the noise.
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto -m '' $(or $(TESTS),--junit-xml=output/junit-all.xml)

# Lines, refusals, floors of imports and seconds of the tests, each beside its limit.
figures: $(VENV)/.installed
	$(BIN)/python benchmarks/figures.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The tests of the package itself under the lower bounds of its dependencies, where Flax warns.
lowest: .venv-lowest/.installed
	.venv-lowest/bin/python -m pytest -n auto tests src --ignore-glob='*test_example_*' \
	  --ignore-glob='*multiprocess_job*' \
	  -W 'ignore:jax.array_ref:DeprecationWarning' -W 'ignore:jax.ArrayRef:DeprecationWarning'

# The documentation, in output/site: broken links and anchors are errors. The pages open from the
# disk; their search needs a server, such as that of `mkdocs serve`.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Speed beside the peers: half an hour or more on two cores; rewrites docs/benchmarks.md.
bench: $(VENV)/.bench
	@$(BIN)/python -c 'import torch, pytorch_optimizer' 2>/dev/null || { \
	  echo 'Without the peers of PyTorch: they are skipped. To have them:'; \
	  echo '  $(BIN)/pip install torch && $(BIN)/pip install --no-deps pytorch_optimizer'; }
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/report.py

# The step compiled for TPUs and GPUs that are not there: hours, of which any may be stopped and
# gone on with; rewrites docs/accelerators.md. The environment has 2 GB.
accelerators: .venv-accelerators/.installed
	.venv-accelerators/bin/python benchmarks/cycles.py
	.venv-accelerators/bin/python benchmarks/accelerators.py
	.venv-accelerators/bin/python benchmarks/accelerators_page.py

# One leaf of every format and rounding, against the targets of benchmarks/targets.py.
accelerators-check: .venv-accelerators/.installed
	.venv-accelerators/bin/python benchmarks/accelerators.py --check

clean:
	rm -rf .venv .venv-lowest .venv-accelerators output

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'adamaxw needs Python 3.11 or newer: make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

.venv-lowest/.installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint tests/lowest.txt --editable '.[test]'
	@touch $@

# The compiler for CUDA comes without the libraries of CUDA, which only a GPU needs.
.venv-accelerators/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-accelerators
	.venv-accelerators/bin/pip install --quiet 'jax[tpu]' cramjam psutil rich --editable .
	version=$$(.venv-accelerators/bin/python -c 'import jax; print(jax.__version__)') && \
	  .venv-accelerators/bin/pip install --quiet --no-deps nvidia-cuda-nvdisasm \
	  jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	@touch $@
