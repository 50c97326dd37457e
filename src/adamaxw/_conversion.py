"""Two states of programs side by side: which parts of them are moments, and what is kept.

Moments may lie anywhere in a tree of wrappers, as states of ours or of Optax.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import SequenceKey, keystr

from adamaxw import _leaves, _optax_state
from adamaxw._optimizer import AdamaxState

# From `state` and `like`, whose moments belong to the same parameters and whose residuals are None,
# to `state` in the format of `like`; given the name of `like` for errors.
Reformat = Callable[[AdamaxState, AdamaxState, str], AdamaxState]


def convert(state: Any, like: Any, reformat: Reformat, path: tuple[Any, ...] = ()) -> Any:
    """See `moments.convert`.

    Args:
        state: that of the optimizer that ran, or the part of it at `path`.
        like: what stands there in the other state.
        reformat: how one `AdamaxState` is converted.
        path: where in the state.
    """
    if isinstance(state, AdamaxState) or isinstance(like, AdamaxState):
        return _convert_moments(state, like, reformat, keystr(path))
    if type(state) is type(like) is tuple and len(state) != len(like):
        return _convert_chain(state, like, reformat, path)
    parts, treedef = _parts(state)
    others, other_treedef = _parts(like)
    if treedef != other_treedef:
        raise _differ(state, like, keystr(path))
    if jax.tree_util.treedef_is_leaf(treedef):
        return _kept(state, like, keystr(path))
    return treedef.unflatten(
        convert(part, other, reformat, path + key)
        for (key, part), (_, other) in zip(parts, others, strict=True)
    )


def put(moments: AdamaxState, like: Any) -> Any:
    """`like` with other moments.

    Raises:
        ValueError: it has not one place for them, but none or several.
    """

    def is_place(node: Any) -> bool:
        return isinstance(node, AdamaxState) or _optax_state.is_state(node)

    leaves, treedef = jax.tree.flatten(like, is_leaf=is_place)
    places = [i for i, leaf in enumerate(leaves) if is_place(leaf)]
    if len(places) != 1:
        raise ValueError(
            "like must have the state of one adamaxw or adamax for Moments to go to, got "
            f"{len(places)}"
        )
    leaves[places[0]] = moments
    return treedef.unflatten(leaves)


def _parts(node: Any) -> tuple[list[Any], Any]:
    """The parts of a node with their keys, and what the node itself is."""
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _convert_chain(state: Any, like: Any, reformat: Reformat, path: tuple[Any, ...]) -> Any:
    """The same for two chains, one of them longer: `scale_by_adamax` and more stand in it for ours.

    As in `chain(clip, scale_by_adamax(), add_decayed_weights(wd), scale_by_learning_rate(lr))`
    beside `chain(clip, adamaxw(lr, weight_decay=wd))`.
    """
    longer, more = max(state, like, key=len), abs(len(state) - len(like))
    places = [i for i, part in enumerate(longer) if isinstance(part, optax.ScaleByAdamState)]
    if len(places) != 1 or places[0] + more >= len(longer):
        raise _differ(state, like, keystr(path))
    (i,) = places
    end = i + more + 1
    nested = (*longer[:i], longer[i:end], *longer[end:])
    is_state_longer = longer is state
    keys = [j for j in range(len(state)) if not (is_state_longer and i < j < end)]
    pairs = zip(nested, like, strict=True) if is_state_longer else zip(state, nested, strict=True)
    new = [
        convert(part, other, reformat, (*path, SequenceKey(key)))
        for key, (part, other) in zip(keys, pairs, strict=True)
    ]
    return tuple(new) if is_state_longer else (*new[:i], *new[i], *new[i + 1 :])


def _convert_moments(state: Any, like: Any, reformat: Reformat, where: str) -> Any:
    name, other_name = f"state{where}", f"like{where}"
    for each, node in ((name, state), (other_name, like)):
        if not isinstance(node, AdamaxState) and not _optax_state.is_state(node):
            raise TypeError(
                f"no state of adamaxw or adamax at {each}, but {_describe(node)}{_hint(node)}"
            )
    source = state if isinstance(state, AdamaxState) else _optax_state.widened(state)
    is_ours = isinstance(like, AdamaxState)
    goal = like if is_ours else jax.eval_shape(_optax_state.widened, like)
    count = source.count
    for each, node in ((name, source), (other_name, goal)):
        _leaves.check_count(f"{each}.count", node.count)
        scale = node.nu_scale
        if scale is not None and not _leaves.is_array(scale, jnp.float32):
            raise TypeError(
                f"{each}.nu_scale must be a float32 scalar or None, got {_leaves.describe(scale)}"
            )
        for path, x in jax.tree_util.tree_leaves_with_path(node._replace(count=None)):
            if not _leaves.is_numeric(x):
                raise TypeError(f"{each}{keystr(path)} must be an array, got {_leaves.describe(x)}")
    if getattr(count, "dtype", None) != jnp.int32:
        source = source._replace(count=jnp.asarray(count, jnp.int32))
    _check_alike(name, source, other_name, goal)
    if not isinstance(state, AdamaxState):
        _optax_state.check(name, state)
    residual, seed = _residual(name, source, other_name, goal), None
    if goal.seed is not None:
        seed = source.seed
        if seed is None:
            seed = jnp.zeros_like(source.count, dtype=jnp.uint32)
    new = reformat(source._replace(residual=None), goal._replace(residual=None), other_name)
    new = new._replace(residual=residual, seed=seed)
    return new if is_ours else _optax_state.written(other_name, new, like)


def _check_alike(name: str, state: AdamaxState, other_name: str, like: AdamaxState) -> None:
    """Refuses moments that do not belong to the same parameters."""
    trees = {
        f"{name}.mu": state.mu,
        f"{other_name}.mu": like.mu,
        f"{other_name}.nu": like.nu,
        f"{name}.nu": state.nu,
    }
    for (here, tree), (there, other) in itertools.pairwise(trees.items()):
        _leaves.check_structures(here, tree, there, other)
    rows = zip(
        jax.tree_util.tree_leaves_with_path(state.mu),
        *map(jax.tree.leaves, (state.nu, like.mu, like.nu)),
        strict=True,
    )
    for (path, m), u, other_m, other_u in rows:
        leaf = keystr(path)
        if not m.shape == u.shape == other_m.shape == other_u.shape:
            raise ValueError(
                f"{name}.mu{leaf} and .nu{leaf} have shapes {m.shape} and {u.shape}, those of "
                f"{other_name} {other_m.shape} and {other_u.shape}"
            )
        kind, other_kind = _kind(m, u), _kind(other_m, other_u)
        if kind != other_kind:
            raise TypeError(
                f"{name}.mu{leaf} is {m.dtype}, of a parameter that is {kind}, and "
                f"{other_name}.mu{leaf} {other_m.dtype}, of one that is {other_kind}"
            )


def _kind(m: Any, u: Any) -> str:
    if jnp.issubdtype(m.dtype, jnp.complexfloating):
        return "complex"
    return "real" if _leaves.trains(m, u) else str(m.dtype)


def _residual(name: str, state: AdamaxState, other_name: str, like: AdamaxState) -> Any:
    """The residual of `state`, zeros where only `like` has one."""
    old, goal = state.residual, like.residual
    for each, tree in ((name, old), (other_name, goal)):
        if tree is None:
            continue
        _leaves.check_structures(f"{each}.residual", tree, f"{name}.mu", state.mu)
        rows = zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(state.mu), strict=True
        )
        for (path, x), m in rows:
            if x.shape != m.shape or x.dtype not in (jnp.int8, jnp.int16):
                raise TypeError(
                    f"{each}.residual{keystr(path)} must be int16 of shape {m.shape}, or int8 "
                    f"where there is none, got {_leaves.describe(x)}"
                )
    dtypes, others = ([x.dtype for x in jax.tree.leaves(tree)] for tree in (old, goal))
    if old is not None and dtypes != others:
        raise ValueError(
            f"{name}.residual holds the low bits of float32 weights, for which {other_name} has no "
            "place, or not the same: take the weights from adamaxw.moments.master_params and go on "
            "with them, or give the bits up by state._replace(residual=None)"
        )
    if old is not None or goal is None:
        return old
    # Like the moments, which lie where the parameters lie.
    treedef = jax.tree.structure(state.mu)
    pairs = zip(jax.tree.leaves(state.mu), jax.tree.leaves(goal), strict=True)
    return treedef.unflatten([jnp.zeros_like(m, dtype=x.dtype) for m, x in pairs])


def _kept(x: Any, like: Any, where: str) -> Any:
    """A leaf that is no moment, as it is."""
    if not hasattr(like, "dtype"):
        return x
    if isinstance(x, (bool, int, float, complex)):
        # Such as a learning rate set by hand: a number has no dtype of its own.
        if like.shape == () and jnp.result_type(x, like.dtype) == like.dtype:
            return jnp.asarray(x, like.dtype)
    elif (getattr(x, "shape", None), getattr(x, "dtype", None)) == (like.shape, like.dtype):
        return x
    raise TypeError(
        f"state{where} is no moment and would be kept as it is, but it is {_leaves.describe(x)} "
        f"where like{where} is {_leaves.describe(like)}: replace it in state first"
    )


def _differ(state: Any, like: Any, where: str) -> Exception:
    if type(state) is type(like) and _describe(state) == _describe(like):
        hint = ", whose static fields differ: pass the states of the optimizers alone"
    else:
        hint = _hint(state)
    return ValueError(
        f"state{where} and like{where} differ in structure: {_describe(state)} and "
        f"{_describe(like)}{hint}"
    )


def _hint(node: Any) -> str:
    """What to say where a checkpoint has come back as plain containers."""
    if type(node) not in (dict, list):
        return ""
    return ". Restore a checkpoint as jax.eval_shape(optimizer.init, params), of the old optimizer"


def _describe(node: Any) -> str:
    if type(node) is tuple:
        return f"a tuple of {', '.join(type(part).__name__ for part in node) or 'nothing'}"
    if isinstance(node, dict):
        return f"a dict of {', '.join(map(repr, node)) or 'nothing'}"
    return f"a {type(node).__name__}"
