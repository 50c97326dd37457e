"""The states of `optax.adamaxw` and `optax.adamax`, and how ours are written as theirs.

Optax's is a chain: the moments, what a decay of the weights keeps, what the learning rate keeps.
The last two are counts, or nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adamaxw import _formats
from adamaxw._optimizer import AdamaxState

# |m_t| <= u_t (1 - b1) / (1 - b1 / b2), see docs/numerics.md. That is at most 2 u_t where the norm
# remembers at least twice as long as the first moment: 1 - b2 <= (1 - b1) / 2.
_LARGEST_RATIO = 2


def is_state(node: Any) -> bool:
    """Whether a node has the type of such a state, or of that of `scale_by_adamax` alone."""
    head, *rest = node if type(node) is tuple and node else (node,)
    return isinstance(head, optax.ScaleByAdamState) and all(map(_holds_counts_only, rest))


def _holds_counts_only(node: Any) -> bool:
    if isinstance(node, optax.MaskedState):
        return _holds_counts_only(node.inner_state)
    return isinstance(node, optax.EmptyState) or getattr(node, "_fields", None) == ("count",)


def widened(node: Any) -> AdamaxState:
    """The moments of a state for which `is_state` holds, in the format of `moment_dtype=None`."""
    moments = node[0] if type(node) is tuple else node

    def widen(x: Any, part: int) -> Any:
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        # Optax's norm of complex parameters is complex, and real in value.
        x = jnp.real(x) if part else jnp.asarray(x)
        return x.astype(_formats.WIDE.dtypes(x.dtype)[part])

    mu = jax.tree.map(lambda m: widen(m, 0), moments.mu)
    nu = jax.tree.map(lambda u: widen(u, 1), moments.nu)
    return AdamaxState(moments.count, mu, nu)


def written(name: str, state: AdamaxState, like: Any) -> Any:
    """A state in the format of `moment_dtype=None` in the types of `like`, one of Optax.

    Args:
        name: what errors call `like`.
        state: the moments.
        like: for which `is_state` holds.

    Returns:
        The state; every schedule in it stands at the count of the moments.

    Raises:
        ValueError: a dtype of `like` does not hold a moment; not checked where traced.
    """
    moments = [*jax.tree.leaves(state.mu), *jax.tree.leaves(state.nu)]
    rows = jax.tree_util.tree_leaves_with_path(like)
    counts = [state.count] * (len(rows) - len(moments))
    values = [*counts[:1], *moments, *counts[1:]]
    first_norm = 1 + len(moments) // 2

    def write(index: int, x: Any, path: Any, dtype: Any) -> Any:
        if not 0 < index <= len(moments):
            # A copy: what is in a state twice cannot be donated.
            return jnp.array(x, dtype)
        x = jnp.asarray(x)
        y = x.astype(dtype)
        if dtype == x.dtype or isinstance(y, Tracer):
            return y
        lost = jnp.isfinite(x) != jnp.isfinite(y)
        if index >= first_norm:
            lost |= (x > 0) & (y == 0)
        if lost.any():
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} is {dtype}, which cannot hold all moments of "
                "state; Optax would divide by zero or infinity. Keep its parameters in float32"
            )
        return y

    leaves = [
        write(index, x, path, other.dtype)
        for index, (x, (path, other)) in enumerate(zip(values, rows, strict=True))
    ]
    return jax.tree.structure(like).unflatten(leaves)


def check(name: str, node: Any) -> None:
    """Refuses a state that is of this type but not AdaMax's, or has counts that differ.

    Only values tell: nothing is refused where they are traced.

    Args:
        name: what errors call it.
        node: for which `is_state` holds; moments in pairs of one shape and kind.

    Raises:
        ValueError: the norms cannot be infinity norms, as those of Adam; or a schedule does not
            stand at the count of the moments.
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(node)):
        return
    moments, *rest = node if type(node) is tuple else (node,)
    count, *others = (np.asarray(x).tolist() for x in jax.tree.leaves((moments.count, rest)))
    if any(other != count for other in others):
        raise ValueError(
            f"{name} has done {count} updates, but its schedules stand at {others}; an AdamaxState "
            "has one count for all. Set them to the one to go on with, as by "
            "optax.tree.set(state, count=...)"
        )
    rows = jax.tree_util.tree_leaves_with_path(moments.mu)
    for (path, m), u in zip(rows, jax.tree.leaves(moments.nu), strict=True):
        are_numbers = all(jnp.issubdtype(x.dtype, jnp.inexact) for x in (m, u))
        if are_numbers and not _may_be_norm(m, u):
            leaf = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} is the state of another optimizer, such as adam or adamw, which have the "
                f"same type: in nu{leaf} are elements less than half of those in mu{leaf}, or 0 "
                "beside others that are not, as in no infinity norm. An average of squares does "
                "not convert: go on with the state of init, and warm the learning rate up. If nu "
                "is an infinity norm all the same, put pack(Moments(count, mu, nu)) in place of "
                f"{name} (both of adamaxw.moments)"
            )


@jax.jit
def _may_be_norm(m: jax.Array, u: jax.Array) -> jax.Array:
    m, u = jnp.abs(m), jnp.real(u)
    # A norm is at least eps, but in float16, which has 0 for 1e-8, and where a leaf has had no
    # gradient, all of which is 0.
    holds_eps = jnp.finfo(u.dtype).tiny < 1e-8
    has_zeros = (u == 0).any() & (u > 0).any() & holds_eps
    m, u = (x.astype(_formats.arithmetic(x.dtype)) for x in (m, u))
    wide = jnp.promote_types(m.dtype, u.dtype)
    return ~((m.astype(wide) > _LARGEST_RATIO * u.astype(wide)).any() | has_zeros)
