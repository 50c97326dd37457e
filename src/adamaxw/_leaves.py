"""Trees of params, gradients and moments as lists of leaves: made, aligned, and checked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves_with_path

from adamaxw._checks import as_array, check_prefix, check_structures, in_words, is_array, kind_of
from adamaxw._formats import FORMATS, Format
from adamaxw._rounding import NEAREST, Rounding, rounding_of
from adamaxw._state import AdamaxState

_HINT = (
    "For another moment_dtype, use adamaxw.moments.convert; for another param_rounding, "
    'state._replace(residual=None). With "exact", params must keep their dtype: where a library '
    'makes them float32, as flowjax and optimistix do, use "stochastic". If np.savez dropped the '
    "dtype bfloat16, restore it with array.view(ml_dtypes.bfloat16)"
)


@jax.tree_util.register_dataclass
@dataclass(slots=True)
class Leaf:
    """A gradient and what belongs to it; where the gradient is None, the others may be subtrees."""

    # `residual` and `p` are None where they are not needed, `rounding` where `p` does not train.

    g: Any
    mu: Any
    nu: Any
    residual: Any
    p: Any
    decays: bool = field(metadata={"static": True})
    rounding: Any = field(metadata={"static": True})


def zeros(params: Any, fmt: Format, param_rounding: str) -> list[Any]:
    """`[mu, nu, residual]` before the first step, trees with the structure of `params`."""
    # Integer and boolean parameters have zeros of their own dtype. The residual is None where there
    # are parameters and none needs one; otherwise parameters without a residual have int8 zeros.
    leaves, treedef = tree_flatten_with_path(params)
    rows = []
    for path, p in leaves:
        p = as_array(p)
        kind = kind_of(p)
        dtype = None if kind is None else jax.dtypes.canonicalize_dtype(p.dtype)
        trains = kind in ("real", "complex")
        rounding = rounding_of(param_rounding, dtype) if trains else NEAREST
        dtypes = fmt.dtypes(dtype) if trains else (dtype, dtype)
        if kind is None or dtypes is None or rounding is None:
            raise TypeError(
                f"params{keystr(path)} must be an array of numbers that moment_dtype={fmt.name} "
                f'and param_rounding="{param_rounding}" support, got {in_words(p)}. Replace it '
                'by None, give it moment_dtype=None or "stochastic" with optax.partition, or use '
                "optax.contrib.split_real_and_imaginary if complex"
            )
        dtypes = (*dtypes, rounding.residual_dtype)
        rows.append([jnp.zeros_like(p, dtype=dtype) for dtype in dtypes])
    mu, nu, residual = columns(treedef, rows, 3)
    has_residual = any(row[2].dtype != NEAREST.residual_dtype for row in rows)
    has_residual |= not rows and param_rounding == "exact"
    return [mu, nu, residual if has_residual else None]


def columns(treedef: Any, rows: list[Any], number: int) -> list[Any]:
    """One tree of the first elements of the rows, one of the second, and so on."""
    # Unflatten with arrays only, never with tuples: users' node classes may inspect their children.
    return [treedef.unflatten([row[i] for row in rows]) for i in range(number)]


def side_by_side(
    updates: Any,
    state: AdamaxState,
    params: Any,
    decays: tuple[bool, ...],
    fmt: Format,
    param_rounding: str,
) -> tuple[Any, list[Leaf]]:
    """The structure of the gradients and their leaves, each with what belongs to it."""
    # A None in the gradients is a leaf. `decays` says which leaves of params decay.
    if updates is None and state.mu is not None:
        raise ValueError("gradients must be a tree with the structure of params, got None")
    gradients, treedef = tree_flatten_with_path(updates, is_leaf=_is_none)

    def leaves(name: str, tree: Any) -> list[Any]:
        return check_prefix("gradients", updates, name, tree, _is_none)

    none = [None] * len(gradients)
    trees = (
        leaves("state.mu", state.mu),
        leaves("state.nu", state.nu),
        none if state.residual is None else leaves("state.residual", state.residual),
        none if params is None else leaves("params", params),
    )
    flags = iter(decays)
    rows = []
    for (path, g), m, u, residual, p in zip(gradients, *trees, strict=True):
        # Where the gradient is None, params may have a subtree.
        decay = sum(next(flags) for _ in jax.tree.leaves(p)) > 0
        rounding = None
        if g is not None:
            g, p = as_array(g), as_array(p)
            given = {"gradients": g} if params is None else {"gradients": g, "params": p}
            rounding = _checked_rounding(keystr(path), given, (m, u, residual), fmt, param_rounding)
        rows.append(Leaf(g, m, u, residual, p, decay, rounding))
    return treedef, rows


def _checked_rounding(
    path: str, given: dict[str, Any], stored: tuple[Any, ...], fmt: Format, param_rounding: str
) -> Rounding | None:
    """How a parameter is rounded, None where it does not train; refuses leaves that do not fit."""
    m, u, residual = stored
    if not jax.tree_util.all_leaves([m]):
        raise ValueError(f"gradients{path} must be a subtree, as params{path} was at init")
    kind = stored_kind(m, u, fmt)
    for name, x in given.items():
        if kind is not None and (kind_of(x) != kind or x.shape != m.shape):
            is_type = kind_of(x) != kind and jax.tree_util.all_leaves([x])
            raise (TypeError if is_type else ValueError)(
                f"{name}{path} must be {kind} of shape {m.shape}, like the parameter at init, got "
                f"{in_words(x)}"
            )
    p = given.get("params", given["gradients"])
    trains = kind in ("real", "complex")
    rounding = rounding_of(param_rounding, p.dtype) if trains else NEAREST
    expected = None if rounding is None else rounding.residual_dtype
    is_optional = residual is None and expected == NEAREST.residual_dtype
    if kind is None or not (is_optional or is_array(residual, expected, m.shape)):
        raise TypeError(
            f"state.mu{path}, state.nu{path} and state.residual{path} must be as init makes them "
            f'for params{path}, {in_words(p)}, moment_dtype={fmt.name} and "{param_rounding}", got '
            f"{', '.join(map(in_words, stored))}. {_HINT}"
        )
    return rounding if trains else None


def checked_state(state: Any, fmt: Format) -> AdamaxState:
    """The state, of the right class and with the scalars that `init` makes for this format."""
    if not isinstance(state, AdamaxState):
        raise TypeError(
            f"state must be the AdamaxState that init returned, got a {type(state).__name__}: use "
            "adamaxw.moments.convert, or restore into jax.eval_shape(opt.init, params)"
        )
    if type(state.count) is int:  # as optax.tree.set may leave it
        state = state._replace(count=jnp.asarray(state.count, jnp.int32))
    scale, seed = state.nu_scale, state.seed
    fits = is_array(scale, jnp.float32) if fmt.has_scale else scale is None
    fits &= kind_of(state.count) == "integer" and state.count.shape == ()
    if not fits or not (seed is None or is_array(seed, jnp.uint32)):
        scalars = ", ".join(map(in_words, (state.count, seed, scale)))
        raise TypeError(
            "state.count, state.seed and state.nu_scale must be as init makes them with "
            f"moment_dtype={fmt.name}, got {scalars}. {_HINT}"
        )
    return state


def moment_rows(mu: Any, nu: Any) -> list[tuple[Any, Any, Any]]:
    """The path of each leaf of two trees of moments, and the two arrays."""
    check_structures("mu", mu, "nu", nu)
    rows = []
    for (path, m), u in zip(tree_leaves_with_path(mu), jax.tree.leaves(nu), strict=True):
        m, u, name = as_array(m), as_array(u), keystr(path)
        are_arrays = kind_of(m) is not None and kind_of(u) is not None
        if not are_arrays or m.shape != u.shape:
            raise (ValueError if are_arrays else TypeError)(
                f"mu{name} and nu{name} must be arrays of one shape, got {in_words(m)} and "
                f"{in_words(u)}"
            )
        rows.append((path, m, u))
    return rows


def map_moments(function: Callable[[Any, Any, Any], tuple[Any, Any]], mu: Any, nu: Any) -> Any:
    """Maps the moments of each leaf that trains by a function of a row of `moment_rows`."""
    rows = [function(path, m, u) if trains(m, u) else (m, u) for path, m, u in moment_rows(mu, nu)]
    return columns(jax.tree.structure(mu), rows, 2)


def trains(mu: Any, nu: Any) -> bool:
    """Whether two moments are of a parameter that trains; the others have one integer dtype."""
    return mu.dtype != nu.dtype or jnp.issubdtype(mu.dtype, jnp.inexact)


def format_of(path: Any, mu: Any, nu: Any, nu_scale: Any) -> Format:
    """The format of the moments of one leaf that trains, in a state with this scale."""
    fmt = stored_format(mu, nu)
    if fmt is None or fmt.has_scale != is_array(nu_scale, jnp.float32):
        raise TypeError(
            f"state.mu{keystr(path)}, state.nu{keystr(path)} and nu_scale are not in any format: "
            f"{in_words(mu)}, {in_words(nu)}, {in_words(nu_scale)}; if init was called under "
            "jax.vmap, call this under it, too"
        )
    return fmt


def stored_format(mu: Any, nu: Any) -> Format | None:
    """The format of the moments of one leaf; None where they have none."""
    return next((fmt for fmt in FORMATS if stored_kind(mu, nu, fmt) in ("real", "complex")), None)


def stored_kind(m: Any, u: Any, fmt: Format) -> str | None:
    """The kind of the parameter with these moments; None if no parameter has such moments."""
    fits = kind_of(m) is not None and kind_of(u) is not None and m.shape == u.shape
    return _kind_of_dtypes(m.dtype, u.dtype, fmt) if fits else None


@cache
def _kind_of_dtypes(m: Any, u: Any, fmt: Format) -> str | None:
    if (m, u) in (fmt.dtypes(jnp.float32), fmt.dtypes(jnp.float64)):
        return "real"
    if (m, u) in (fmt.dtypes(jnp.complex64), fmt.dtypes(jnp.complex128)):
        return "complex"
    return "integer" if m == u and not jnp.issubdtype(m, jnp.inexact) else None


def _is_none(x: Any) -> bool:
    return x is None
