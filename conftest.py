"""Settings of every test, doctest and snippet of the documentation."""

import os
from pathlib import Path

import hypothesis
import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

_OUTPUT = Path(__file__).parent / "output"

# Before Keras is imported, which reads its settings from there, and not from the user's home.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("KERAS_HOME", str(_OUTPUT / "keras"))

# A device that waits for others blocks a thread of XLA's pool, which has one per core or device.
# With eight devices on two cores, some would wait for a thread, and the others for them.
os.environ.setdefault("NPROC", "16")

# Before any computation: eight devices, so that meshes can be tested without accelerators.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiled programs are kept for later runs, which then take a third of the time. Each worker has a
# folder of its own, because JAX does not write entries atomically.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
jax.config.update("jax_compilation_cache_dir", str(_OUTPUT / "compiled" / _WORKER))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# The same examples each time, so that only changes to the code make a test fail; FUZZ draws others.
hypothesis.settings.register_profile(
    "default", deadline=None, print_blob=True, derandomize="FUZZ" not in os.environ
)
hypothesis.settings.load_profile("default")


@pytest.fixture
def standard_promotion():
    """Lifts strict dtype promotion, which parts of Optax do not support."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compile_fast():
    """For tests that mostly compile, and do not depend on XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _before_snippets(namespace):
    # As readers run them: Optax's schedules do not support strict promotion.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_disable_most_optimizations", True)


def _after_snippets(namespace):
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", False)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    setup=_before_snippets,
    teardown=_after_snippets,
).pytest()
