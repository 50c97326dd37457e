"""Modes of JAX in which a part of a test runs."""

import jax
import optax


def x64():
    """A context with float64; its name moved between versions of JAX."""
    from jax import experimental

    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else experimental.enable_x64()


def apply_updates(params, updates):
    """optax.apply_updates, which adds the float32 updates of "exact" by promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)
