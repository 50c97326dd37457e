"""What users pass in: hyperparameters, arrays and trees, checked where they come in."""

import reprlib
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamaxw._rule import Scalar

# The least eps keeps moments of its size clear of denormal numbers, which XLA flushes to zero.
_BOUNDS = {
    "learning_rate": (0, "<", np.inf),
    "b1": (0, "<", 1),
    "b2": (0, "<=", 1),
    "eps": (1e-30, "<", np.inf),
    "weight_decay": (0, "<", np.inf),
}


def hyperparameter(name: str, value: Any, label: str = "") -> Any:
    """A number, or an array of shape (), as a Python float or an array of JAX; or a schedule."""
    # Errors call it by its label, if it has one.
    label = label or name
    if callable(value) and name in ("learning_rate", "weight_decay"):
        return value
    dtype = getattr(value, "dtype", None) or np.dtype(type(value))
    is_wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4
    if not (is_wide or jnp.issubdtype(dtype, jnp.integer)):
        schedule = " or a schedule" if name in ("learning_rate", "weight_decay") else ""
        raise TypeError(
            f"{label} must be a real scalar of at least 32 bits{schedule}, got {in_words(value)} "
            "(0.999 is 1 in bfloat16). To schedule b1, b2 or eps, use optax.inject_hyperparams, "
            "with hyperparam_dtype=jnp.float32 if params are bfloat16"
        )
    if getattr(value, "shape", ()):
        raise ValueError(f"{label} must have shape (), got {in_words(value)}")
    if isinstance(value, Tracer):
        return value.astype(jnp.result_type(float))
    low, relation, high = _BOUNDS[name]
    known = np.asarray(value)  # Under a trace, comparing an array of JAX would be traced as well.
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(known)  # A b1 that is 1 in float32 would divide by zero.
    if not (low <= known and (rounded < high or (relation == "<=" and rounded == high))):
        ascent = "; for gradient ascent, chain optax.scale(-1.) before the optimizer"
        raise ValueError(
            f"{label} must satisfy {low} <= {name} {relation} {high} in float32, got {value!r}"
            + (ascent if name == "learning_rate" else "")
        )
    return value.astype(jnp.result_type(float)) if isinstance(value, jax.Array) else float(known)


def at(name: str, value: Any, count: jax.Array) -> Scalar:
    """The value after `count` updates: checks what a schedule returns, passes the rest through."""
    return hyperparameter(name, value(count), f"{name}(count)") if callable(value) else value


def kind_of(x: Any) -> str | None:
    """The kind of an array: real, complex or integer (or boolean); None for anything else."""
    return _kind_of_dtype(getattr(x, "dtype", None)) if hasattr(x, "shape") else None


@cache
def _kind_of_dtype(dtype: Any) -> str | None:
    if not isinstance(dtype, np.dtype):  # of a key of JAX, or of another library
        return None
    if jnp.issubdtype(dtype, jnp.floating):
        return "real"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    is_integer = jnp.issubdtype(dtype, jnp.integer) or dtype in (np.bool_, jax.dtypes.float0)
    return "integer" if is_integer else None


def is_array(x: Any, dtype: Any, shape: tuple[int, ...] = ()) -> bool:
    """Whether `x` is an array of this dtype and shape."""
    return kind_of(x) is not None and x.dtype == dtype and x.shape == shape


def as_array(x: Any) -> Any:
    """`x` as a JAX array if it is a Python number or an inexact NumPy array; otherwise `x`."""
    is_number = isinstance(x, (bool, int, float, complex)) or hasattr(x, "__jax_array__")
    is_numpy = isinstance(x, (np.ndarray, np.generic)) and kind_of(x) in ("real", "complex")
    return jnp.asarray(x) if is_number or is_numpy else x


def in_words(x: Any) -> str:
    """A short description of a leaf for error messages: dtype and shape, never all values."""
    is_array = hasattr(x, "dtype") and hasattr(x, "shape")
    return f"{x.dtype} of shape {x.shape}" if is_array else reprlib.repr(x)


def check_prefix(
    prefix_name: str, prefix: Any, name: str, tree: Any, is_leaf: Any = None
) -> list[Any]:
    """The subtrees of `tree` at the leaves of `prefix`; a ValueError if it is not a prefix."""
    try:
        return jax.tree.structure(prefix, is_leaf=is_leaf).flatten_up_to(tree)
    except ValueError as error:
        where = str(error)
        try:
            jax.tree.broadcast(prefix, tree, is_leaf=is_leaf)
        except ValueError as told:  # with the path
            where = str(told).replace("broadcast_prefix prefix_tree", prefix_name)
        raise ValueError(f"{prefix_name} and {name} differ in structure: {where}") from None


def check_structures(name: str, tree: Any, other_name: str, other: Any) -> None:
    """Raises a ValueError that names both trees, and the path, if they differ in structure."""
    check_prefix(name, tree, other_name, other)
    check_prefix(other_name, other, name, tree)
