"""Settings of every test, doctest and snippet of the documentation."""

import os
from pathlib import Path

import hypothesis
import jax
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

# Before Keras is imported, which reads its settings from there, and not from the user's home.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("KERAS_HOME", str(Path(__file__).parent / "output" / "keras"))

# A device that waits for others holds a thread of XLA's pool, which has one per core or device:
# with eight devices on two cores, some would wait for a thread, and all for them.
os.environ.setdefault("NPROC", "16")

# Before any computation: eight devices, so that meshes can be tested without accelerators.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples each time, so that a test fails for what was changed; FUZZ draws others.
hypothesis.settings.register_profile(
    "default", deadline=None, print_blob=True, derandomize="FUZZ" not in os.environ
)
hypothesis.settings.load_profile("default")


@pytest.fixture
def standard_promotion():
    """Lifts strict dtype promotion, as Optax needs it in places."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def compile_fast():
    """For tests that mostly compile, of what does not depend on XLA's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def _before_snippets(namespace):
    # As readers run them: the schedules of Optax do not know strict promotion.
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_disable_most_optimizations", True)


def _after_snippets(namespace):
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", False)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md", "docs/*.md"],
    setup=_before_snippets,
    teardown=_after_snippets,
).pytest()
