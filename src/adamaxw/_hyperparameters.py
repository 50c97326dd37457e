"""Hyperparameters: what is accepted, and what is refused before it can train silently wrong."""

import reprlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamaxw._rule import Scalar

# Moments that matter beside it then stay clear of the denormal numbers, which XLA flushes to zero.
_SMALLEST_EPS = 1e-30

_INJECTED = (
    ". If optax.inject_hyperparams made it, give that hyperparam_dtype=jnp.float32: it rounds "
    "hyperparameters to the dtype of the params"
)

# Each bound is checked on the value rounded to float32: a b1 that becomes 1 there divides by zero.
_ALLOWED: dict[str, tuple[str, Callable[[np.float32], Any]]] = {
    "learning_rate": ("0 <= learning_rate < inf", lambda x: 0 <= x < np.inf),
    "b1": ("0 <= b1 < 1", lambda x: 0 <= x < 1),
    "b2": ("0 <= b2 <= 1", lambda x: 0 <= x <= 1),
    "eps": (f"{_SMALLEST_EPS} <= eps < inf", lambda x: np.float32(_SMALLEST_EPS) <= x < np.inf),
    "weight_decay": ("0 <= weight_decay < inf", lambda x: 0 <= x < np.inf),
}


def checked(name: str, value: Any, label: str = "") -> Scalar:
    """Returns `value` as a Python float or an array of shape (), or refuses it.

    Args:
        name: the hyperparameter's name.
        value: a number, a NumPy scalar or array, or a JAX array (traced too) of shape ().
        label: what the errors call it, if not by its name.

    Raises:
        TypeError: it is none of these, or its dtype is complex, boolean or narrower than float32.
        ValueError: its shape is not (), or it is out of bounds (not checked where traced).
    """
    scalar = _as_scalar(label or name, value, "" if label else _INJECTED)
    if isinstance(scalar, Tracer):
        return scalar
    allowed, is_allowed = _ALLOWED[name]
    known = np.asarray(scalar)  # In a traced function, comparing an array of JAX is traced too.
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(known)
    # A tiny negative number rounds to 0 in float32, but has no logarithm.
    if not is_allowed(rounded) or known < 0:
        ascent = "; for gradient ascent, chain optax.scale(-1.) before the optimizer"
        raise ValueError(
            f"{label or name} must satisfy {allowed} in float32, got {value!r}"
            + (ascent if name == "learning_rate" else "")
        )
    return scalar


def at(name: str, value: Any, count: jax.Array) -> Scalar:
    """The value of a number, an array or a schedule after `count` updates (0 before the first).

    Raises:
        TypeError, ValueError: what a schedule returned is refused as that value alone would be.
    """
    return checked(name, value(count), f"{name}(count)") if callable(value) else value


def _as_scalar(name: str, value: Any, hint: str) -> Scalar:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        schedule = ""
        if name in ("learning_rate", "weight_decay"):
            schedule = " or a schedule (a callable of the number of updates done)"
        elif callable(value):
            schedule = "; to schedule it, wrap the optimizer in optax.inject_hyperparams"
        raise TypeError(
            f"{name} must be a real number or a scalar array{schedule}, got {reprlib.repr(value)}"
        )
    if value.shape != ():
        raise ValueError(f"{name} must have shape (), got an array of shape {value.shape}")
    is_floating = jnp.issubdtype(value.dtype, jnp.floating)
    if is_floating and value.dtype.itemsize < 4:
        raise TypeError(
            f"{name} came as {value.dtype}, which is too coarse for a hyperparameter (0.999 is 1 "
            f"in bfloat16, 1e-8 is 0 in float16): pass float32{hint}"
        )
    if not is_floating and not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{name} must be real, got an array of dtype {value.dtype}")
    return value.astype(jnp.result_type(float)) if isinstance(value, jax.Array) else float(value)
