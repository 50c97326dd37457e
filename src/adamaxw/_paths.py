"""The names of leaves, with the Variables of Flax NNX as leaves; Flax is not imported for them."""

import sys
from typing import Any

import jax
from jax.tree_util import keystr, tree_leaves_with_path


def _is_variable(x: Any) -> bool:
    """Whether `x` is a Variable of Flax NNX, which params and masks made of them may hold.

    An empty Variable does not count: `optax.partition` uses those as placeholders.
    """
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Variable) and bool(jax.tree.leaves(x))


def pure(tree: Any) -> Any:
    """`tree` with the Variables of Flax NNX replaced by what they hold."""
    if "flax.nnx" not in sys.modules:
        return tree

    def value(x: Any) -> Any:
        # Its only child as a pytree: the accessors differ between versions of Flax.
        return jax.tree.leaves(x, is_leaf=lambda y: y is not x)[0] if _is_variable(x) else x

    return jax.tree.map(value, tree, is_leaf=_is_variable)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, the keys joined with `/`; Variables are no keys."""
    leaves = tree_leaves_with_path(pure(tree))
    return [(keystr(path, simple=True, separator="/"), x) for path, x in leaves]
