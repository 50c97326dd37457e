"""Which leaves decay: a mask, whatever its form, as one boolean for each leaf of params."""

from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from adamaxw._leaves import check_prefix, describe, is_array
from adamaxw._paths import pure

_INJECTED = (
    ". optax.inject_hyperparams calls a callable mask as if it were a schedule, with the count for "
    "params; keep it from that with static_args=('mask',), or choose from adamaxw.masks"
)


def refuse_called_mask(mask: Any, hyperparameters: tuple[Any, ...]) -> None:
    """Refuses a lone boolean beside hyperparameters that are arrays.

    That is what `optax.inject_hyperparams` makes of a callable mask such as
    `lambda params: jax.tree.map(lambda p: p.ndim > 1, params)`: the count has no dimensions, so
    the mask becomes False and nothing decays. A boolean that the caller wrote is a valid prefix of
    every tree, and only the arrays tell the two apart.

    Raises:
        TypeError: naming `static_args`.
    """
    if isinstance(mask, (bool, np.bool_)) and any(
        isinstance(value, jax.Array) for value in hyperparameters
    ):
        raise TypeError(
            f"mask={mask} beside hyperparameters that are arrays cannot be told from a callable "
            "mask that was called by mistake: pass mask=None to decay all leaves, weight_decay=0 "
            f"to decay none{_INJECTED}"
        )


def resolve_mask(mask: Any, params: optax.Params) -> tuple[bool, ...]:
    """Which leaves of `params` decay, one boolean for each.

    Args:
        mask: None (all decay), a tree of booleans that has the structure of params or is a prefix
            of it, or a function from params to such a tree.
        params: any tree. Its leaves matter only to a function that looks at them.

    Raises:
        TypeError: a leaf is not a boolean, or is traced.
        ValueError: the mask is no prefix of params.
    """
    if mask is None:
        mask = True
    if hasattr(mask, "flags_of"):  # one of `masks`, which need no tree
        return tuple(mask.flags_of(params))
    # A module with a __call__ can also be the tree: then it has boolean leaves.
    if callable(mask) and not any(map(_is_boolean, jax.tree.leaves(mask))):
        mask = mask(params)
    # Flax NNX gives params with Variables to init and without them to update.
    mask, params = pure(mask), pure(params)
    booleans = [_as_bool(*row) for row in jax.tree_util.tree_leaves_with_path(mask)]
    subtrees = check_prefix("mask", mask, "params", params)
    sizes = [len(jax.tree.leaves(subtree)) for subtree in subtrees]
    return tuple(x for x, size in zip(booleans, sizes, strict=True) for _ in range(size))


def _is_boolean(leaf: Any) -> bool:
    is_value = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
    return isinstance(leaf, bool) or (is_value and is_array(leaf, np.bool_))


def _as_bool(path: jax.tree_util.KeyPath, leaf: Any) -> bool:
    name = f"mask{jax.tree_util.keystr(path)}"
    # A function that was called by mistake leaves one value in place of the whole tree.
    hint = "" if path else _INJECTED
    is_traced = isinstance(leaf, Tracer)
    if is_traced or not _is_boolean(leaf):
        raise TypeError(
            f"{name} must be one boolean for a leaf or subtree, known when the step is compiled, "
            f"got {'a traced ' if is_traced else ''}{describe(leaf)}{hint}"
        )
    return bool(leaf)
