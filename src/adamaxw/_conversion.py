"""Converts the state of one optimizer for another: ours in any format and Optax's, in any wrapper.

The state of `optax.adamaxw` and `optax.adamax` is a chain: the moments, then the states of the
weight decay and the learning rate, each of which is a count or empty.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves_with_path

from adamaxw import _checks, _leaves
from adamaxw._formats import WIDE
from adamaxw._state import AdamaxState, is_state

# Encodes the moments of a state in the format of a `moment_dtype`, for an eps.
Repack = Callable[[AdamaxState, Any, Any], AdamaxState]

_HINT = ". Restore a checkpoint into jax.eval_shape(optimizer.init, params)"


def convert(state: Any, like: Any, repack: Repack, path: Any = ()) -> list[Any]:
    """The leaves of what `moments.convert` returns, in the order of `like`."""
    where = keystr(path)
    if is_state(state) or is_state(like):
        return _converted(state, like, repack, where)
    if type(state) is type(like) is tuple and len(state) != len(like):
        state, like = _aligned(state, like)
    parts, treedef = tree_flatten_with_path(state, is_leaf=lambda x: x is not state)
    others, goal = jax.tree.flatten(like, is_leaf=lambda x: x is not like)
    if treedef != goal:
        raise ValueError(f"state{where} and like{where} differ: {treedef}, {goal}{_HINT}")
    if jax.tree_util.all_leaves([state]):
        return [_cast_like(state, like, f"state{where}", f"like{where}")]
    pairs = zip(parts, others, strict=True)
    return [x for (key, part), other in pairs for x in convert(part, other, repack, path + key)]


def put(moments: AdamaxState, like: Any) -> Any:
    """`like` with other moments; it must contain the state of exactly one AdaMax optimizer."""
    nodes = jax.tree.leaves(like, is_leaf=_has_moments)
    places = [node for node in nodes if _has_moments(node)]
    if len(places) != 1:
        raise ValueError(f"like must have one state of adamaxw or adamax, got {len(places)}")
    return jax.tree.map(lambda x: moments if x is places[0] else x, like, is_leaf=_has_moments)


def _aligned(state: tuple[Any, ...], like: tuple[Any, ...]) -> tuple[Any, Any]:
    """Nests `scale_by_adamax` and its companions in one chain where the other has `adamaxw`."""
    # Such as `chain(clip, scale_by_adamax(), add_decayed_weights(wd), scale_by_learning_rate(lr))`
    # beside `chain(clip, adamaxw(lr, weight_decay=wd))`.
    longer, extra = max(state, like, key=len), abs(len(state) - len(like))
    starts = [i for i, part in enumerate(longer) if isinstance(part, optax.ScaleByAdamState)]
    if len(starts) != 1:
        return state, like
    start, end = starts[0], starts[0] + 1 + extra
    nested = (*longer[:start], longer[start:end], *longer[end:])
    return (state, nested) if longer is like else (nested, like)


def _converted(state: Any, like: Any, repack: Repack, where: str) -> list[Any]:
    """The leaves of `like`, a state of ours or of Optax, with the moments of `state`."""
    name, other = f"state{where}", f"like{where}"
    for each, node in ((name, state), (other, like)):
        if not _has_moments(node):
            parts = [type(part).__name__ for part in _chain(node)]
            raise TypeError(f"{each} must be a state of adamaxw or adamax, got {parts}{_HINT}")
    source = state if is_state(state) else _from_optax(name, *_chain(state))
    goal = like if is_state(like) else AdamaxState(*_chain(like)[0])
    trees = {f"{other}.mu": goal.mu, f"{name}.nu": source.nu, f"{name}.residual": source.residual}
    for where, tree in trees.items():
        if tree is not None:
            _checks.check_structures(f"{name}.mu", source.mu, where, tree)
    # bfloat16 moments of Optax are those of bfloat16 parameters, not our format of that name.
    formats = _formats_of(goal) if is_state(like) else {WIDE}
    has_scale = source.nu_scale is not None, goal.nu_scale is not None
    if formats == _formats_of(source) and has_scale[0] == has_scale[1]:
        new = source
    elif not formats:  # no leaf trains
        new = source._replace(nu_scale=goal.nu_scale)
    else:
        eps = 1e-8 if goal.nu_scale is None else goal.nu_scale
        if isinstance(eps, jax.ShapeDtypeStruct):
            raise TypeError(f"{other}.nu_scale must be an array, as opt.init makes it, got {eps}")
        new = repack(source, formats.pop().name, eps)

    count = jnp.asarray(source.count, jnp.int32)
    residual, dtypes = source.residual, [x.dtype for x in jax.tree.leaves(goal.residual)]
    if residual is None:  # a new one is placed like the moments
        pairs = zip(jax.tree.leaves(source.mu), dtypes, strict=False)
        residual = [jnp.zeros_like(m, dtype=dtype) for m, dtype in pairs]
    elif [x.dtype for x in jax.tree.leaves(residual)] != dtypes:
        raise ValueError(
            f"{name}.residual has low bits of weights, which {other} cannot keep: continue with "
            "moments.master_params, or drop the bits by state._replace(residual=None)"
        )
    seed = None
    if goal.seed is not None:
        seed = jnp.zeros_like(count, dtype=jnp.uint32) if source.seed is None else source.seed
    new = AdamaxState(count, new.mu, new.nu, new.nu_scale, residual, seed)
    leaves, goals = tree_leaves_with_path(new), tree_leaves_with_path(like)
    if not is_state(like):
        # Copies of the count, because a buffer that is in a state twice cannot be donated.
        leaves += [(leaves[0][0], jnp.array(count, x.dtype)) for _, x in goals[len(leaves) :]]
    return [
        _cast_like(jnp.asarray(x), y, name + keystr(path), other + keystr(other_path), path[0].name)
        for (path, x), (other_path, y) in zip(leaves, goals, strict=True)
    ]


def _formats_of(state: AdamaxState) -> set[Any]:
    """The formats of the leaves that train: one, unless there are no such leaves."""
    rows = zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True)
    return {_leaves.stored_format(m, u) for m, u in rows if _leaves.trains(m, u)}


def _cast_like(x: Any, like: Any, name: str, other: str, field: str = "") -> Any:
    """A leaf with the shape and dtype of `like`; only moments are cast, within their kind."""
    is_number = isinstance(x, (bool, int, float, complex)) and getattr(like, "shape", None) == ()
    if is_number and jnp.result_type(x, like.dtype) == like.dtype:
        return jnp.asarray(x, like.dtype)  # such as a learning rate that was set by hand
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", object)
    if not hasattr(like, "dtype") or (shape, dtype) == (like.shape, like.dtype):
        return x
    words = f"{name} is {_checks.in_words(x)}, but {other} is {_checks.in_words(like)}"
    # Optax stores the real norms of complex parameters as complex numbers.
    kinds: Any = {"mu": (jnp.floating, jnp.complexfloating), "nu": (jnp.inexact,)}.get(field, ())
    if kinds and shape != like.shape:
        raise ValueError(words)
    if not any(jnp.issubdtype(dtype, k) and jnp.issubdtype(like.dtype, k) for k in kinds):
        raise TypeError(words if kinds else f"{words}: replace it in state first")
    y = jnp.asarray(x).astype(like.dtype)
    lost = (jnp.isfinite(x) != jnp.isfinite(y)) | ((field == "nu") & (x != 0) & (y == 0))
    if not isinstance(y, Tracer) and lost.any():
        raise ValueError(f"{words}, which is too narrow: the next step would divide by 0 or inf")
    return y


def _has_moments(node: Any) -> bool:
    """Whether a node is an AdamaxState or has the type of its counterpart in Optax."""
    moments, *rest = _chain(node)
    if not isinstance(moments, optax.ScaleByAdamState):
        return is_state(node)
    return all(keystr(path).endswith(".count") for path, _ in tree_leaves_with_path(rest))


def _chain(node: Any) -> tuple[Any, ...]:
    """The parts of a state of Optax: a chain, or the state of `scale_by_adamax` alone."""
    return node if type(node) is tuple and node else (node,)


def _from_optax(name: str, moments: optax.ScaleByAdamState, *schedules: Any) -> AdamaxState:
    """The moments of a state of Optax in the format of `moment_dtype=None`."""
    # Adam's state has the same type: only its values can tell, so traced states pass unchecked.
    if not any(isinstance(x, Tracer) for x in jax.tree.leaves((moments, schedules))):
        count, *others = map(int, jax.tree.leaves((moments.count, schedules)))
        if any(other != count for other in others):
            raise ValueError(
                f"{name} has count {count}, its schedules {others}: use optax.tree.set(.., count=n)"
            )
        # Structures are compared later.
        rows = zip(tree_leaves_with_path(moments.mu), jax.tree.leaves(moments.nu), strict=False)
        for (path, m), u in rows:
            if jnp.issubdtype(u.dtype, jnp.inexact) and not _may_be_norm(m, u):
                raise ValueError(
                    f"{name} is the state of another optimizer, such as Adam: nu{keystr(path)} is "
                    "too small beside mu for an infinity norm. Start from init, with a warmup; if "
                    f"it is a norm, pass pack(Moments(count, mu, nu)) in place of {name}"
                )

    def widen(x: Any, part: int) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return (jnp.real(x) if part else jnp.asarray(x)).astype(WIDE.dtypes(x.dtype)[part])

    mu, nu = (jax.tree.map(lambda x, i=i: widen(x, i), tree) for i, tree in enumerate(moments[1:]))
    return AdamaxState(moments.count, mu, nu)


@jax.jit
def _may_be_norm(m: jax.Array, u: jax.Array) -> jax.Array:
    # |m_t| <= u_t (1 - b1) / (1 - b1 / b2), see docs/numerics.md: at most 2 u_t if the norm
    # remembers at least twice as long as the first moment, 1 - b2 <= (1 - b1) / 2.
    m, u = jnp.abs(m), jnp.real(u)
    # eps keeps norms above 0, unless a leaf never had a gradient, or is float16: 1e-8 is 0 there.
    has_zeros = (u == 0).any() & (u > 0).any() & (jnp.finfo(u.dtype).tiny < 1e-8)
    return ~((m.astype(u.dtype) > 2 * u).any() | has_zeros)
