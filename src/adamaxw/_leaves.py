"""Leaves of params, gradients and moments: allocated, put side by side, errors with their path."""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adamaxw._formats import FORMATS, Format
from adamaxw._rounding import NEAREST, ParamRounding, Rounding

_TRAINED = ("real", "complex")


@jax.tree_util.register_dataclass
@dataclass(slots=True)
class Leaf:
    """A gradient and what belongs to it.

    Attributes:
        g: gradient, an array, or None.
        mu: stored first moment; any subtree where the gradient is None.
        nu: stored infinity norm; likewise.
        residual: what the rounding keeps; likewise. None where the tree has none.
        p: parameter; any subtree where the gradient is None, and None where params were not given.
        decays: whether the parameter decays.
        rounding: how its new value is rounded, a `Rounding`; None where it does not train.
    """

    g: Any
    mu: Any
    nu: Any
    residual: Any
    p: Any
    decays: bool = field(metadata={"static": True})
    rounding: Any = field(metadata={"static": True})


def zeros(params: Any, fmt: Format, param_rounding: ParamRounding) -> list[Any]:
    """Moments and residuals before the first step, with the shapes and shardings of `params`.

    Args:
        params: a tree of arrays, Python numbers or `jax.ShapeDtypeStruct`.
        fmt: how moments are stored.
        param_rounding: how parameters are rounded.

    Returns:
        `[mu, nu, residual]`: trees in the structure of params, zeros in the dtypes of the format;
        zeros of their own dtype for integer and boolean parameters. No tree of residuals, but None,
        where there are parameters and none has one; else int8 stands beside those without.

    Raises:
        TypeError: a leaf is no array of numbers, or the format or rounding does not fit it.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    rows = []
    for path, p in leaves:
        p = as_array(p)
        dtypes = _state_dtypes(f"params{jax.tree_util.keystr(path)}", p, fmt, param_rounding)
        rows.append([jnp.zeros_like(p, dtype=dtype) for dtype in dtypes])
    mu, nu, residual = columns(treedef, rows, 3)
    has_residual = any(row[2].dtype != NEAREST.residual_dtype for row in rows)
    has_residual |= not rows and param_rounding.name == "exact"
    return [mu, nu, residual if has_residual else None]


def _state_dtypes(name: str, p: Any, fmt: Format, param_rounding: ParamRounding) -> tuple[Any, ...]:
    """Dtypes of `mu`, `nu` and the residual beside a parameter."""
    if _kind(p) is None:
        raise TypeError(
            f"{name} must be an array of numbers, got {describe(p)}; filter such leaves out, with "
            "None in their place"
        )
    dtype = jax.dtypes.canonicalize_dtype(p.dtype)
    if _kind(p) == "integer":
        return dtype, dtype, NEAREST.residual_dtype
    dtypes = fmt.dtypes(dtype)
    if dtypes is None:
        raise TypeError(
            f"{name} is {dtype}, which moment_dtype={fmt.name} cannot hold: wrap the optimizer in "
            "optax.contrib.split_real_and_imaginary, or pass moment_dtype=None, with "
            "optax.partition for this parameter alone"
        )
    return *dtypes, _rounding_of(name, dtype, param_rounding).residual_dtype


def columns(treedef: Any, rows: list[Any], number: int) -> list[Any]:
    """Trees of the first, second ... of each row. Nothing but these ever goes into their nodes.

    A class of the user may look at what it is given, and arrays are all that it expects.
    """
    return [treedef.unflatten([row[i] for row in rows]) for i in range(number)]


def side_by_side(
    updates: Any,
    moments: tuple[Any, Any, Any],
    params: Any,
    decays: tuple[bool, ...],
    fmt: Format,
    param_rounding: ParamRounding,
) -> tuple[Any, list[Leaf]]:
    """Aligns the gradients with the moments and params, leaf by leaf.

    Args:
        updates: the gradients; a None in them is a leaf.
        moments: `(mu, nu, residual)` of the state, as `zeros` made them.
        params: the parameters, or None: not needed.
        decays: which leaves of params decay.
        fmt: how moments are stored.
        param_rounding: how parameters are rounded.

    Returns:
        The structure of `updates` and its leaves with what belongs to them.

    Raises:
        ValueError: a tree differs from the gradients in structure, or a leaf in shape.
        TypeError: a gradient or parameter is real where the state is complex or integer, or the
            like, or no array; or the state is not as `zeros` makes it.
    """
    mu, nu, residual = moments
    if updates is None and mu is not None:
        raise ValueError("gradients are None; a tree in the structure of params is needed")
    gradients, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=_is_none)

    def leaves(name: str, tree: Any) -> list[Any]:
        return check_prefix("gradients", updates, name, tree, _is_none)

    none = [None] * len(gradients)
    columns = (
        leaves("state.mu", mu),
        leaves("state.nu", nu),
        none if residual is None else leaves("state.residual", residual),
        none if params is None else leaves("params", params),
    )
    flags = iter(decays)
    rows = []
    for (path, g), m, u, r, p in zip(gradients, *columns, strict=True):
        # Where the gradient is None, params may have a subtree.
        decay = sum(next(flags) for _ in jax.tree.leaves(p)) > 0
        how = None
        if g is not None:
            g, p = as_array(g), as_array(p)
            where = jax.tree_util.keystr(path)
            given = {"gradients": g} if params is None else {"gradients": g, "params": p}
            kind = _kind_of_row(where, given, m, u, fmt)
            how = _rounding_of_row(where, kind, g, r, p, param_rounding)
        rows.append(Leaf(g, m, u, r, p, decay, how))
    return treedef, rows


def _kind_of_row(path: str, given: dict[str, Any], m: Any, u: Any, fmt: Format) -> str:
    """The kind of a parameter, on which its moments and what is given of it must agree."""
    if not jax.tree_util.all_leaves([m]):
        raise ValueError(f"gradients{path} is a leaf where params had a subtree at init")
    kind, kinds = _stored_kind(m, u, fmt), {name: _kind(x) for name, x in given.items()}
    is_cast = kind == "integer" and kinds.get("params") in _TRAINED
    if kind is None or is_cast or m.shape != u.shape:
        g = given["gradients"]
        dtypes = fmt.dtypes(g.dtype if kinds["gradients"] in _TRAINED else jnp.float32) or ()
        expected = " and ".join(jnp.dtype(dtype).name for dtype in dtypes)
        hint = "A state made with another moment_dtype is converted by adamaxw.moments.convert"
        if getattr(m, "dtype", None) == np.dtype("V2"):
            hint = "np.savez forgets bfloat16: array.view(ml_dtypes.bfloat16) gives it back"
        raise TypeError(
            f"state.mu{path} and state.nu{path} must be {expected} of shape {jnp.shape(g)}, as "
            f"init makes them, got {describe(m)} and {describe(u)}. {hint}"
        )
    for name, x in given.items():
        if kinds[name] != kind or x.shape != m.shape:
            same_kind = kinds[name] == kind or not jax.tree_util.all_leaves([x])
            raise (ValueError if same_kind else TypeError)(
                f"{name}{path} must be {kind} of shape {m.shape}, like the parameter at init, got "
                f"{describe(x)}"
            )
    return kind


def _rounding_of_row(
    path: str, kind: str, g: Any, r: Any, p: Any, param_rounding: ParamRounding
) -> Rounding | None:
    """How the new value of a parameter is rounded, None for integers; its residual must fit."""
    dtype = (g if p is None else p).dtype  # Without params nothing is rounded.
    trained = kind in _TRAINED
    how = _rounding_of(f"params{path}", dtype, param_rounding) if trained else NEAREST
    is_needed = how.residual_dtype != NEAREST.residual_dtype
    if is_array(r, how.residual_dtype, g.shape) or (r is None and not is_needed):
        return how if trained else None
    if is_needed:
        raise TypeError(
            f"state.residual{path} must be int16 of shape {g.shape}, got {describe(r)}: init makes "
            'it for the bfloat16 params that it is given with param_rounding="exact"'
        )
    raise TypeError(
        f"params{path} came as {dtype}, but state.residual{path} is {describe(r)}, as "
        'param_rounding="exact" keeps for bfloat16: what applies the updates must keep the dtype, '
        "as optax.apply_updates does; where it cannot, as in flowjax and optimistix, use "
        '"stochastic". For another param_rounding, use state._replace(residual=None)'
    )


def _rounding_of(name: str, dtype: Any, param_rounding: ParamRounding) -> Rounding:
    rounding = param_rounding.of(dtype)
    if rounding is None:
        raise TypeError(
            f'{name} is {dtype}, for which param_rounding="{param_rounding.name}" is not defined, '
            f"but for {', '.join(param_rounding.narrow)}: use optax.partition to give it another"
        )
    return rounding


def moment_rows(mu: Any, nu: Any) -> list[tuple[Any, Any, Any]]:
    """The path of each leaf of two trees of moments, and the two arrays.

    Raises:
        ValueError: the trees differ, or two leaves in shape.
        TypeError: a leaf is no array of numbers.
    """
    check_structures("mu", mu, "nu", nu)
    rows = []
    for (path, m), u in zip(
        jax.tree_util.tree_leaves_with_path(mu), jax.tree.leaves(nu), strict=True
    ):
        m, u = as_array(m), as_array(u)
        name = jax.tree_util.keystr(path)
        if _kind(m) is None or _kind(u) is None:
            raise TypeError(
                f"mu{name} and nu{name} must be arrays, got {describe(m)}, {describe(u)}"
            )
        if m.shape != u.shape:
            raise ValueError(f"mu{name} has shape {m.shape}, nu{name} has {u.shape}")
        rows.append((path, m, u))
    return rows


def map_moments(function: Callable[[Any, Any, Any], tuple[Any, Any]], mu: Any, nu: Any) -> Any:
    """Maps two moments of each leaf that trains to two others; the other leaves stay.

    Args:
        function: of a row of `moment_rows`.
        mu: a tree of arrays.
        nu: a tree in the structure of `mu`, with the same shapes.
    """
    rows = [
        (m, u) if not trains(m, u) else function(path, m, u) for path, m, u in moment_rows(mu, nu)
    ]
    return columns(jax.tree.structure(mu), rows, 2)


def trains(mu: Any, nu: Any) -> bool:
    """Whether two moments are of a parameter that trains; the others have one integer dtype."""
    return mu.dtype != nu.dtype or jnp.issubdtype(mu.dtype, jnp.inexact)


def stored_format(mu: Any, nu: Any) -> Format | None:
    """The format of the moments of one leaf; None where it is none."""
    return next((fmt for fmt in FORMATS if _stored_kind(mu, nu, fmt) in _TRAINED), None)


def format_of(path: Any, mu: Any, nu: Any, nu_scale: Any) -> Format:
    """The format of the moments of one leaf that trains, in a state with this scale.

    Raises:
        TypeError: it is none; names the path.
    """
    fmt = stored_format(mu, nu)
    if fmt is None or fmt.has_scale != is_array(nu_scale, jnp.float32):
        name = jax.tree_util.keystr(path)
        hint = ". The state of a vmapped optimizer wants jax.vmap here, too"
        raise TypeError(
            f"state.mu{name} and state.nu{name} are no moments of any format, with nu_scale "
            f"{describe(nu_scale)}: {describe(mu)} and {describe(nu)}"
            + (hint if getattr(nu_scale, "ndim", 0) else "")
        )
    return fmt


def is_array(x: Any, dtype: Any, shape: tuple[int, ...] = ()) -> bool:
    """Whether `x` is an array of this dtype and shape."""
    return _kind(x) is not None and x.dtype == dtype and x.shape == shape


def check_count(name: str, count: Any) -> None:
    """Refuses what is no number of updates done: no integer, or, where known, none of int32."""
    is_scalar = is_numeric(count) and count.shape == ()
    is_integer = is_scalar and jnp.issubdtype(count.dtype, jnp.integer)
    if not is_integer and type(count) is not int:
        raise TypeError(f"{name} must be an integer, got {describe(count)}")
    is_known = not isinstance(count, (Tracer, jax.ShapeDtypeStruct))
    if is_known and not 0 <= int(count) < 2**31:
        raise ValueError(f"{name} must satisfy 0 <= count < 2**31, got {count}")


def as_array(x: Any) -> Any:
    """`x` as an array of JAX, if it is a number or an array of numbers; else as it is."""
    is_number = isinstance(x, (bool, int, float, complex)) or hasattr(x, "__jax_array__")
    is_numpy = isinstance(x, (np.ndarray, np.generic)) and _kind(x) in _TRAINED
    return jnp.asarray(x) if is_number or is_numpy else x


def is_numeric(x: Any) -> bool:
    """Whether `x` is an array of numbers."""
    return _kind(x) is not None


def check_prefix(
    prefix_name: str,
    prefix: Any,
    name: str,
    tree: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> list[Any]:
    """The subtrees of a tree below the leaves of a prefix of it.

    Raises:
        ValueError: `prefix` is no prefix of `tree`; names both, and the path.
    """
    try:
        return jax.tree.structure(prefix, is_leaf=is_leaf).flatten_up_to(tree)
    except ValueError as error:
        where = str(error)
        try:
            jax.tree.broadcast(prefix, tree, is_leaf=is_leaf)
        except ValueError as told:  # with the path
            where = str(told).replace("broadcast_prefix prefix_tree", prefix_name)
        raise ValueError(f"{prefix_name} and {name} differ in structure: {where}") from None


def check_structures(
    name: str,
    tree: Any,
    other_name: str,
    other: Any,
    is_leaf: Callable[[Any], bool] | None = None,
) -> None:
    """Raises a ValueError that names both trees, and the path, if they differ in structure."""
    check_prefix(name, tree, other_name, other, is_leaf)
    check_prefix(other_name, other, name, tree, is_leaf)


def describe(x: Any) -> str:
    """A few words on a leaf that was refused, however large it is."""
    is_array = hasattr(x, "dtype") and hasattr(x, "shape")
    return f"{x.dtype} of shape {x.shape}" if is_array else reprlib.repr(x)


def _stored_kind(m: Any, u: Any, fmt: Format) -> str | None:
    """What parameters the moments of a leaf belong to; None if no parameter has such moments."""
    return _kind_of_dtypes(m.dtype, u.dtype, fmt) if _kind(m) and _kind(u) else None


@cache
def _kind_of_dtypes(m: Any, u: Any, fmt: Format) -> str | None:
    for dtype in (jnp.float32, jnp.float64, jnp.complex64, jnp.complex128):
        if fmt.dtypes(dtype) == (m, u):
            return _kind_of_dtype(jnp.dtype(dtype))
    return "integer" if m == u and _kind_of_dtype(m) == "integer" else None


def _is_none(x: Any) -> bool:
    return x is None


def _kind(x: Any) -> str | None:
    """Leaves meet only their kind; None for what is no array of numbers."""
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
