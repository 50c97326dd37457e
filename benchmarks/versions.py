"""The software and machine behind a figure."""

import platform

import jax
import optax


def versions() -> str:
    """Versions, backend and machine, on one line."""
    return (
        f"optax {optax.__version__}, jax {jax.__version__}, {jax.default_backend()}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
