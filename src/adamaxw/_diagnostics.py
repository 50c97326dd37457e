"""What the optimizer does, as a few scalars for a logger."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adamaxw import _hyperparameters, _leaves, _paths
from adamaxw._state import AdamaxState

# Formats round eps by half a level of uint8 at most.
_AT_FLOOR = 2 ** (1 / 12) * (1 + 1e-4)


def diagnostics(
    updates: optax.Updates,
    state: Any,
    params: optax.Params,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    groups: bool = False,
) -> dict[str, jax.Array]:
    """Scalars that show how training goes, for any logger; meant for inside `jax.jit`.

    Args:
        updates: what `update` returned. None and integers in it do not count.
        state: the state that it returned: an `AdamaxState`, or the state of a wrapper or chain that
            holds one or several, such as `nnx.Optimizer.opt_state`.
        params: the parameters, before the updates or after.
        eps: that of the optimizer; 'at_floor' alone needs it.
        groups: whether to add the same of each key at the top of params, as `f"{key}/{name}"`.

    Returns:
        A dict of float32 scalars, whose keys depend on the structure of the arguments alone:

        - 'update_norm', 'param_norm': global 2-norms of updates and params;
        - 'update_to_weight': the first over the second; 1e-3 or so, as a rule of thumb; inf where
          all parameters are 0;
        - 'lost', where parameters are bfloat16 or float16: the fraction of their updates other
          than 0 that leave the parameter as it is. With `param_rounding` "stochastic" and "exact"
          it is 0, unless something has scaled the updates since: then training stands still. With
          "nearest" it says how much of the training rounding undoes;
        - 'at_floor': the fraction of elements whose infinity norm is at its lower bound, eps. They
          have not seen a gradient that counts, for long;
        - 'saturated', with `moment_dtype="uint8"` alone: the fraction of those at the upper bound,
          `eps * 2**42.5`. Their steps are too small: raise eps, or clip or scale the gradients.

        Fractions are of the elements that have moments, and left out where none has. Squares are
        summed in float32, for which elements must lie between 1e-19 and 1e19. Inside
        `jax.shard_map` all of it is that of a shard.

    Raises:
        TypeError: updates are None, no `AdamaxState` is found in `state`, or a leaf is no array;
            names the path.
        TypeError, ValueError: eps is out of bounds, as in `adamaxw`.

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> opt = adamaxw.adamax(0.5)
        >>> params = {"w": jnp.ones(3), "b": jnp.zeros(1)}
        >>> grads = {"w": jnp.array([1.0, -2.0, 0.0]), "b": jnp.zeros(1)}
        >>> updates, state = opt.update(grads, opt.init(params), params)
        >>> for name, value in adamaxw.diagnostics(updates, state, params).items():
        ...     print(f"{name:17}{value:.3f}")
        update_norm      0.707
        param_norm       1.732
        update_to_weight 0.408
        at_floor         0.500
    """
    if updates is None:
        raise TypeError("updates must be what update returned, got None")
    floor = jnp.asarray(_hyperparameters.checked("eps", eps), jnp.float32) * np.float32(_AT_FLOOR)
    update_squares = _Terms(_squares("updates", updates))
    param_squares = _Terms(_squares("params", params))
    narrow = list(_narrow(updates, params))
    lost = _Terms((key, stays) for key, stays, _ in narrow)
    changes = _Terms((key, changes) for key, _, changes in narrow)
    trained = list(_trained(state, floor))
    sizes = _Terms((key, jnp.float32(size)) for key, size, _ in trained)
    counts = {
        name: _Terms((key, size * x[name]) for key, size, x in trained if name in x)
        for name in dict.fromkeys(name for *_, fractions in trained for name in fractions)
    }

    def of(key: str | None) -> dict[str, jax.Array]:
        update, param = (jnp.sqrt(terms.sum(key)) for terms in (update_squares, param_squares))
        result = {
            "update_norm": update,
            "param_norm": param,
            "update_to_weight": update / jnp.where(update == 0, 1, param),
        }
        if key in changes.groups:
            result["lost"] = lost.sum(key) / jnp.maximum(changes.sum(key), 1)
        if key in sizes.groups:
            result |= {name: terms.sum(key) / sizes.sum(key) for name, terms in counts.items()}
        return result

    result = of(None)
    for key in param_squares.groups if groups else ():
        if key is not None:
            result |= {f"{key}/{name}": value for name, value in of(key).items()}
    return result


class _Terms:
    """Scalars that add up: those of each key at the top of a tree, and under None of all."""

    def __init__(self, terms: Iterable[tuple[str | None, Any]]):
        self.groups: dict[str | None, list[Any]] = {}
        for key, term in terms:
            for group in {None, key}:
                self.groups.setdefault(group, []).append(term)

    def sum(self, key: str | None) -> jax.Array:
        return jnp.sum(jnp.stack([jnp.float32(0), *self.groups.get(key, ())]))


def _squares(name: str, tree: Any) -> Iterator[tuple[str | None, jax.Array]]:
    """The first key of each leaf of real or complex numbers, with its squared 2-norm."""
    for path, x in jax.tree_util.tree_leaves_with_path(_paths.pure(tree)):
        x = _leaves.as_array(x)
        if not _leaves.is_numeric(x):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array, got {_leaves.describe(x)}"
            )
        if jnp.issubdtype(x.dtype, jnp.inexact):
            size = jnp.abs(x).astype(jnp.float32)
            yield _first(path), jnp.sum(size * size)


def _narrow(updates: Any, params: Any) -> Iterator[tuple[str | None, jax.Array, jax.Array]]:
    """The first key of each leaf of less than 32 bits; how many updates are lost, and not 0."""
    updates, params = _paths.pure(updates), _paths.pure(params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    for (path, p), u in zip(leaves, treedef.flatten_up_to(updates), strict=True):
        p = _leaves.as_array(p)
        if u is not None and jnp.issubdtype(p.dtype, jnp.floating) and p.dtype.itemsize < 4:
            changes = u != 0
            stays = (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype) == p
            lost = jnp.sum(changes & stays, dtype=jnp.float32)
            yield _first(path), lost, jnp.sum(changes, dtype=jnp.float32)


def _trained(state: Any, floor: Any) -> Iterator[tuple[str | None, float, dict[str, jax.Array]]]:
    """The first key of each leaf that trains, its size and fractions."""
    nodes = jax.tree.leaves(_paths.pure(state), is_leaf=lambda x: isinstance(x, AdamaxState))
    states = [node for node in nodes if isinstance(node, AdamaxState)]
    if not states:
        raise TypeError(
            f"state must be an AdamaxState or hold one; there is none in this "
            f"{type(state).__name__}"
        )
    for s in states:
        for path, mu, nu in _leaves.moment_rows(s.mu, s.nu):
            if not mu.size or not _leaves.trains(mu, nu):
                continue
            fmt = _leaves.format_of(path, mu, nu, s.nu_scale)
            _, u = fmt.decode(mu, nu, s.nu_scale, jnp.float32)
            chosen = {"at_floor": u.astype(jnp.float32) <= floor} | fmt.saturated(mu, nu)
            # A number of elements may be larger than an int32.
            size = float(mu.size)
            yield _first(path), size, {k: jnp.mean(x, dtype=jnp.float32) for k, x in chosen.items()}


def _first(path: jax.tree_util.KeyPath) -> str | None:
    return jax.tree_util.keystr(path[:1], simple=True) if path else None
