"""The names of leaves, with the Variables of Flax NNX as leaves; Flax is not imported for them."""

import sys
from typing import Any

import jax
from jax.tree_util import default_registry


def _is_variable(x: Any) -> bool:
    """Whether `x` is a Variable of Flax NNX, which params and masks made of them may hold.

    One without leaves is none: `optax.partition` leaves those in place of others' parameters.
    """
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable) and bool(jax.tree.leaves(x))


def pure(tree: Any) -> Any:
    """`tree` with what they hold in place of the Variables of Flax NNX."""
    if "flax.nnx" not in sys.modules:
        return tree
    return jax.tree.map(lambda x: _value(x) if _is_variable(x) else x, tree, is_leaf=_is_variable)


def _value(variable: Any) -> Any:
    # Its one child as a pytree: the methods for it differ between versions of Flax.
    children, _ = default_registry.flatten_one_level(variable)
    return next(iter(children))


def named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, the keys joined with `/`; Variables are no keys."""
    leaves = jax.tree_util.tree_leaves_with_path(pure(tree))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
