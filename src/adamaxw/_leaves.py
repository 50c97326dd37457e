"""Leaves of params, gradients and moments: allocated, put side by side, errors with their path."""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding


class Leaf(NamedTuple):
    """A gradient and what belongs to it.

    Attributes:
        g: gradient, an array, or None.
        m: first moment; any subtree where the gradient is None.
        u: infinity norm; likewise.
        p: parameter; likewise, and None where params were not given.
        decays: whether the parameter decays.
    """

    g: Any
    m: Any
    u: Any
    p: Any
    decays: bool


def zeros_for_moments(params: Any, *, real: bool) -> Any:
    """A moment before the first step, with the structure, shapes and shardings of `params`.

    Args:
        params: a tree of arrays, Python numbers or `jax.ShapeDtypeStruct`.
        real: whether complex parameters get real zeros (infinity norm) or complex (first moment).

    Returns:
        float32 zeros, float64 for 64-bit parameters, complex likewise; zeros of their own dtype
        for integer and boolean parameters.

    Raises:
        TypeError: a leaf is no array of numbers.
    """

    def zeros(path: jax.tree_util.KeyPath, p: Any) -> jax.Array:
        p = _as_array(p)
        if _kind(p) is None:
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} must be an array of numbers, got "
                f"{describe(p)}; filter such leaves out, with None in their place"
            )
        first, norm = _moment_dtypes(jax.dtypes.canonicalize_dtype(p.dtype))
        return jnp.zeros_like(p, dtype=norm if real else first)

    return jax.tree_util.tree_map_with_path(zeros, params)


def scalar_sharding(params: Any) -> Sharding | None:
    """Where a new scalar must lie so that a compiled step leaves it there: no second compilation.

    Returns:
        Replicated over the one mesh, or on the one device, to which all of `params` is committed,
        or will be if it is abstract; None where there is no such place or it cannot be known.
    """

    def place(sharding: Sharding) -> Sharding | None:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, SingleDeviceSharding):
            return SingleDeviceSharding(*sharding.device_set)
        return None

    def is_placed(p: Any) -> bool:
        if isinstance(p, jax.ShapeDtypeStruct):
            return p.sharding is not None
        return isinstance(p, jax.Array) and not isinstance(p, Tracer) and p.committed

    places = {place(p.sharding) for p in jax.tree.leaves(params) if is_placed(p)}
    return places.pop() if len(places) == 1 else None


def side_by_side(
    updates: Any, mu: Any, nu: Any, params: Any, decays: Any
) -> tuple[Any, list[Leaf]]:
    """Aligns the gradients with the moments and params, leaf by leaf.

    Args:
        updates: the gradients; a None in them is a leaf.
        mu: first moments, in the structure of params.
        nu: infinity norms, likewise.
        params: the parameters, or None: not needed.
        decays: a tree of booleans in the structure of params, or None with it.

    Returns:
        The structure of `updates` and its leaves with what belongs to them.

    Raises:
        ValueError: a tree differs from the gradients in structure, or a leaf in shape.
        TypeError: a gradient or parameter is real where the state is complex or integer, or the
            like, or no array; or the state has been cast since `init`.
    """
    if updates is None and mu is not None:
        raise ValueError("gradients are None; a tree in the structure of params is needed")
    gradients, treedef = jax.tree.flatten(updates, is_leaf=_is_none)

    def leaves(name: str, tree: Any) -> list[Any]:
        try:
            return treedef.flatten_up_to(tree)
        except ValueError:
            broadcast("gradients", updates, name, tree, is_leaf=_is_none)
            raise

    moments = zip(leaves("state.mu", mu), leaves("state.nu", nu), strict=True)
    if params is None:
        parameters = [(None, False)] * len(gradients)
    else:
        parameters = zip(leaves("params", params), leaves("mask", decays), strict=True)

    rows = []
    for index, (g, (m, u), (p, decay)) in enumerate(
        zip(gradients, moments, parameters, strict=True)
    ):
        if g is None:
            rows.append(Leaf(g, m, u, p, decay))
            continue
        g, p = _as_array(g), _as_array(p)
        for name, x in [("gradients", g)] + [("params", p)] * (params is not None):
            if _kind(x) != _kind(m) or x.shape != m.shape:
                raise _misfit(name, updates, index, x, m)
        found = (m.dtype, getattr(u, "dtype", None), getattr(u, "shape", None))
        if found != (*_moment_dtypes(m.dtype), m.shape):
            raise _spoiled(updates, index, m, u)
        rows.append(Leaf(g, m, u, p, decay))
    return treedef, rows


def broadcast(
    prefix_name: str,
    prefix: Any,
    name: str,
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> Any:
    """`jax.tree.broadcast` with an error that names both trees.

    Raises:
        ValueError: `prefix` is no prefix of `tree`; names the path.
    """
    try:
        return jax.tree.broadcast(prefix, tree, is_leaf=is_leaf)
    except ValueError as error:
        where = str(error).replace("broadcast_prefix prefix_tree", prefix_name)
        raise ValueError(f"{prefix_name} and {name} differ in structure: {where}") from None


def trains(m: jax.Array) -> bool:
    """Whether a first moment belongs to a parameter that trains: floating or complex."""
    return _kind(m) != "integer"


def describe(x: Any) -> str:
    """A few words on a leaf that was refused, however large it is."""
    is_array = hasattr(x, "dtype") and hasattr(x, "shape")
    return f"{x.dtype} of shape {x.shape}" if is_array else reprlib.repr(x)


def _path(updates: Any, index: int) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_none)
    return jax.tree_util.keystr(leaves[index][0])


def _misfit(name: str, updates: Any, index: int, x: Any, m: Any) -> Exception:
    path = f"{name}{_path(updates, index)}"
    if not jax.tree_util.all_leaves([m]):
        return ValueError(f"{path} is a leaf where params at init had a subtree: {describe(m)}")
    same_kind = _kind(x) == _kind(m) or not jax.tree_util.all_leaves([x])
    return (ValueError if same_kind else TypeError)(
        f"{path} must be {_kind(m)} of shape {m.shape}, like the parameter at init, "
        f"got {describe(x)}"
    )


def _spoiled(updates: Any, index: int, m: Any, u: Any) -> Exception:
    path = _path(updates, index)
    first, norm = _moment_dtypes(m.dtype)
    return TypeError(
        f"state.mu{path} and state.nu{path} must be as init makes them, {jnp.dtype(first)} and "
        f"{jnp.dtype(norm)} of shape {m.shape}, got {describe(m)} and {describe(u)}"
    )


def _moment_dtypes(dtype: Any) -> tuple[Any, Any]:
    """Dtypes of the first moment and the norm for parameters, or first moments, of a dtype."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype, dtype
    wide = jnp.finfo(dtype).bits == 64
    norm = jnp.float64 if wide else jnp.float32
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (jnp.complex128 if wide else jnp.complex64), norm
    return norm, norm


def _as_array(x: Any) -> Any:
    is_number = isinstance(x, (bool, int, float, complex, np.ndarray, np.generic))
    return jnp.asarray(x) if is_number and _kind(x) != "integer" else x


def _is_none(x: Any) -> bool:
    return x is None


def _kind(x: Any) -> str | None:
    """Leaves meet only their kind; None for what is no array of numbers."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not hasattr(x, "shape"):
        return None
    if jnp.issubdtype(dtype, jnp.floating):
        return "real"
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return "complex"
    is_integer = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
    return "integer" if is_integer or dtype == jax.dtypes.float0 else None
