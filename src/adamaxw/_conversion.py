"""Walks two states side by side, converts moments, ours or Optax's, and keeps everything else.

The state of `optax.adamaxw` and `optax.adamax` is a chain: the moments, then the states of the
weight decay and the learning rate, each of which is a count or empty.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves_with_path

from adamaxw import _formats, _leaves
from adamaxw._state import AdamaxState

# From `state`, `like` and the name of `like` to `state` in the format of `like`; that of
# `moment_dtype=None` where `like` is None.
Reformat = Callable[[AdamaxState, AdamaxState | None, str], AdamaxState]

# |m_t| <= u_t (1 - b1) / (1 - b1 / b2), see docs/numerics.md. That is at most 2 u_t if the norm
# remembers at least twice as long as the first moment: 1 - b2 <= (1 - b1) / 2.
_LARGEST_RATIO = 2

_HINT = (
    ". Both must be as init of an optimizer makes them: restore a checkpoint as "
    "jax.eval_shape(optimizer.init, params)"
)


def convert(state: Any, like: Any, reformat: Reformat) -> list[Any]:
    """The leaves of what `moments.convert` returns, in the order of `like`."""
    leaves = []
    for path, part, other in _side_by_side(state, like):
        if isinstance(part, AdamaxState) or isinstance(other, AdamaxState):
            leaves += _converted(part, other, reformat, keystr(path))
        else:
            leaves.append(_kept(part, other, keystr(path)))
    return leaves


def put(moments: AdamaxState, like: Any) -> Any:
    """`like` with other moments, for which it must have exactly one place."""
    leaves, treedef = jax.tree.flatten(like, is_leaf=_has_moments)
    places = [i for i, leaf in enumerate(leaves) if _has_moments(leaf)]
    if len(places) != 1:
        raise ValueError(
            "like must have the state of one adamaxw or adamax for Moments to go to, got "
            f"{len(places)}"
        )
    leaves[places[0]] = moments
    return treedef.unflatten(leaves)


def _side_by_side(state: Any, like: Any, path: Any = ()) -> Iterator[tuple[Any, Any, Any]]:
    """Pairs each AdamaxState, and each other leaf, with its counterpart; the path comes first."""
    if isinstance(state, AdamaxState) or isinstance(like, AdamaxState):
        yield path, state, like
        return
    if type(state) is type(like) is tuple and len(state) != len(like):
        state, like = _nested(state, like)
    parts, treedef = tree_flatten_with_path(state, is_leaf=lambda x: x is not state)
    others, other_treedef = jax.tree.flatten(like, is_leaf=lambda x: x is not like)
    if treedef != other_treedef:
        where, words = keystr(path), (_describe(state), _describe(like))
        same = ", whose static fields differ: pass the states of the optimizers alone"
        raise ValueError(
            f"state{where} and like{where} differ in structure: {' and '.join(words)}"
            + (same if words[0] == words[1] else _HINT)
        )
    if jax.tree_util.all_leaves([state]):
        yield path, state, like
        return
    for (key, part), other in zip(parts, others, strict=True):
        yield from _side_by_side(part, other, path + key)


def _nested(state: tuple[Any, ...], like: tuple[Any, ...]) -> Any:
    """Aligns two chains, one of which has `scale_by_adamax` and more in place of `adamaxw`.

    Such as `chain(clip, scale_by_adamax(), add_decayed_weights(wd), scale_by_learning_rate(lr))`
    and `chain(clip, adamaxw(lr, weight_decay=wd))`. Both become dicts by the index in `state`, with
    the parts of `adamaxw` as one tuple. Chains that do not fit are returned as they are.
    """
    shorter, longer = sorted((state, like), key=len)
    places = [i for i, part in enumerate(longer) if isinstance(part, optax.ScaleByAdamState)]
    start = places[0] if len(places) == 1 else len(longer)
    end = start + 1 + len(longer) - len(shorter)
    if end > len(longer):
        return state, like
    keys = [i for i in range(len(state)) if longer is like or not start < i < end]
    nested = (*longer[:start], longer[start:end], *longer[end:])
    chains = (state, nested) if longer is like else (nested, like)
    return [dict(zip(keys, chain, strict=True)) for chain in chains]


def _converted(state: Any, like: Any, reformat: Reformat, where: str) -> list[Any]:
    """The leaves of `like`, a state of ours or of Optax, with the moments of `state`."""
    name, other_name = f"state{where}", f"like{where}"
    for each, node in ((name, state), (other_name, like)):
        if not _has_moments(node):
            raise TypeError(
                f"no state of adamaxw or adamax at {each}, but {_describe(node)}{_HINT}"
            )
    source = _widened(state)
    is_ours = isinstance(like, AdamaxState)
    goal = like if is_ours else AdamaxState(*_chain(like)[0])
    _check_alike(name, source, other_name, goal)
    if source is not state:
        _check_optax(name, state)
    new = reformat(source, like if is_ours else None, other_name)
    moments = jax.tree.leaves((new.mu, new.nu))
    (_, *rows), number = tree_leaves_with_path(like), len(moments)
    for i, (path, x) in enumerate(rows[:number]):
        leaf = f"{other_name}{keystr(path)}"
        moments[i] = _cast(leaf, moments[i], x.dtype, is_norm=2 * i >= number)
    count = jnp.asarray(source.count, jnp.int32)
    if not is_ours:
        # Copies, because a buffer that is in a state twice cannot be donated.
        return [count, *moments, *(jnp.array(count, x.dtype) for _, x in rows[number:])]
    residual, seed = source.residual, None
    if residual is None:
        # New residuals are placed like the moments.
        pairs = zip(jax.tree.leaves(source.mu), jax.tree.leaves(like.residual), strict=False)
        residual = [jnp.zeros_like(m, dtype=x.dtype) for m, x in pairs]
    if like.seed is not None:
        seed = jnp.zeros_like(count, dtype=jnp.uint32) if source.seed is None else source.seed
    return [count, *moments, *jax.tree.leaves((new.nu_scale, residual, seed))]


def _check_alike(name: str, state: AdamaxState, other_name: str, like: AdamaxState) -> None:
    """Refuses states that belong to other parameters, and residuals that would be lost."""
    trees = {}
    for each, node in ((name, state), (other_name, like)):
        _leaves.check_count(f"{each}.count", node.count)
        for field, dtype in (("nu_scale", jnp.float32), ("seed", jnp.uint32)):
            x = getattr(node, field)
            if x is not None and not _leaves.is_array(x, dtype):
                raise TypeError(
                    f"{each}.{field} must be as init makes it, got {_leaves.describe(x)}"
                )
        trees |= {f"{each}.mu": node.mu, f"{each}.nu": node.nu}
        if node.residual is not None:
            trees[f"{each}.residual"] = node.residual
    first = f"{name}.mu"
    for there, tree in trees.items():
        _leaves.check_structures(first, state.mu, there, tree)
    paths = [keystr(path) for path, _ in tree_leaves_with_path(state.mu)]
    for path, *leaves in zip(paths, *map(jax.tree.leaves, trees.values()), strict=True):
        row = dict(zip(trees, leaves, strict=True))
        for there, x in row.items():
            if not _leaves.is_numeric(x):
                raise TypeError(f"{there}{path} must be an array, got {_leaves.describe(x)}")
            if x.shape != row[first].shape:
                raise ValueError(
                    f"{first}{path} has shape {row[first].shape}, {there}{path} has {x.shape}"
                )
        kinds = [_kind(row[f"{each}.mu"], row[f"{each}.nu"]) for each in (name, other_name)]
        if kinds[0] != kinds[1]:
            raise TypeError(
                f"{first}{path} is of a parameter that is {kinds[0]}, and {other_name}.mu{path} of "
                f"one that is {kinds[1]}"
            )
        residual, goal = (row.get(f"{each}.residual") for each in (name, other_name))
        if residual is not None and (goal is None or residual.dtype != goal.dtype):
            raise ValueError(
                f"{name}.residual holds the low bits of float32 weights, for which {other_name} "
                "has no place, or not the same: take the weights from "
                "adamaxw.moments.master_params and go on with them, or give the bits up by "
                "state._replace(residual=None)"
            )


def _kind(m: Any, u: Any) -> str:
    if jnp.issubdtype(m.dtype, jnp.complexfloating):
        return "complex"
    return "real" if _leaves.trains(m, u) else str(m.dtype)


def _cast(name: str, x: Any, dtype: Any, is_norm: bool) -> Any:
    """A moment in the dtype that `like` has at `name`."""
    y = jnp.asarray(x).astype(dtype)
    if x.dtype == dtype or isinstance(y, Tracer):
        return y
    is_lost = jnp.isfinite(x) != jnp.isfinite(y)
    if is_norm:
        is_lost |= (x > 0) & (y == 0)
    if is_lost.any():
        raise ValueError(
            f"{name} is {dtype}, which cannot hold all moments of state: the next step would "
            "divide by zero or infinity. Keep its parameters in float32"
        )
    return y


def _kept(x: Any, like: Any, where: str) -> Any:
    """Checks that a leaf other than a moment fits `like`, and returns it."""
    if not hasattr(like, "dtype"):
        return x
    is_number = isinstance(x, (bool, int, float, complex))
    if is_number and like.shape == () and jnp.result_type(x, like.dtype) == like.dtype:
        # Such as a learning rate set by hand: Python numbers have no dtype of their own.
        return jnp.asarray(x, like.dtype)
    if (getattr(x, "shape", None), getattr(x, "dtype", None)) == (like.shape, like.dtype):
        return x
    raise TypeError(
        f"state{where} is no moment and would be kept as it is, but it is {_leaves.describe(x)} "
        f"where like{where} is {_leaves.describe(like)}: replace it in state first"
    )


def _describe(node: Any) -> str:
    if type(node) is tuple:
        return f"a tuple of {', '.join(type(part).__name__ for part in node) or 'nothing'}"
    if isinstance(node, dict):
        return f"a dict of {', '.join(map(repr, node)) or 'nothing'}"
    return f"a {type(node).__name__}"


def _has_moments(node: Any) -> bool:
    """Whether a node is an AdamaxState or has the type of its counterpart in Optax."""
    moments, *rest = _chain(node)
    if not isinstance(moments, optax.ScaleByAdamState):
        return isinstance(node, AdamaxState)
    return all(keystr(path).endswith(".count") for path, _ in tree_leaves_with_path(rest))


def _chain(node: Any) -> tuple[Any, ...]:
    """The parts of a state of Optax: a chain, or the state of `scale_by_adamax` alone."""
    return node if type(node) is tuple and node else (node,)


def _widened(node: Any) -> AdamaxState:
    """The moments of a state of Optax in the format of `moment_dtype=None`; ours as they are."""
    if isinstance(node, AdamaxState):
        return node
    moments = _chain(node)[0]

    def widen(x: Any, part: int) -> Any:
        if not _leaves.is_numeric(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        # Optax stores the real norms of complex parameters as complex numbers.
        x = jnp.real(x) if part else jnp.asarray(x)
        return x.astype(_formats.WIDE.dtypes(x.dtype)[part])

    mu = jax.tree.map(lambda m: widen(m, 0), moments.mu)
    nu = jax.tree.map(lambda u: widen(u, 1), moments.nu)
    return AdamaxState(moments.count, mu, nu)


def _check_optax(name: str, node: Any) -> None:
    """Refuses a state whose schedules have other counts, or which is that of Adam.

    Adam and AdaMax share a type, so only the values tell: traced states are not checked.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(node)):
        return
    moments, *rest = _chain(node)
    count, *others = map(int, jax.tree.leaves((moments.count, rest)))
    if any(other != count for other in others):
        raise ValueError(
            f"{name} has done {count} updates, but its schedules stand at {others}; an AdamaxState "
            "has one count for all. Set them to the one to go on with, as by "
            "optax.tree.set(state, count=...)"
        )
    rows = zip(tree_leaves_with_path(moments.mu), jax.tree.leaves(moments.nu), strict=True)
    for (path, m), u in rows:
        if jnp.issubdtype(u.dtype, jnp.inexact) and not _may_be_norm(m, u):
            raise ValueError(
                f"{name} is the state of another optimizer, such as adam or adamw, which have the "
                f"same type: in nu{keystr(path)} are elements less than half of those in mu, or 0 "
                "beside others that are not, as in no infinity norm. An average of squares does "
                "not convert: go on with the state of init, and warm the learning rate up. If nu "
                "is an infinity norm all the same, put pack(Moments(count, mu, nu)) in place of "
                f"{name} (both of adamaxw.moments)"
            )


@jax.jit
def _may_be_norm(m: jax.Array, u: jax.Array) -> jax.Array:
    m, u = jnp.abs(m), jnp.real(u)
    # eps keeps norms above 0, unless a leaf never had a gradient, or is float16: 1e-8 is 0 there.
    has_zeros = (u == 0).any() & (u > 0).any() & (jnp.finfo(u.dtype).tiny < 1e-8)
    return ~((m.astype(u.dtype) > _LARGEST_RATIO * u).any() | has_zeros)
