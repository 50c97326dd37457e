"""A few scalars about training, for a logger."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath, keystr, tree_flatten_with_path, tree_leaves_with_path

from adamaxw import _checks, _leaves, _paths
from adamaxw._state import is_state

# The first key in the path of a leaf, the name of a sum, and what the leaf adds to it.
Term = tuple[str | None, str, Any]


def diagnostics(
    updates: optax.Updates,
    state: Any,
    params: optax.Params,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    groups: bool = False,
) -> dict[str, jax.Array]:
    """Scalars that show how training goes, to be called inside `jax.jit`.

    Args:
        updates: what `update` returned. None and integer leaves do not count.
        state: the state that it returned: an `AdamaxState`, or the state of a wrapper or chain that
            contains any number of them, such as `nnx.Optimizer.opt_state`.
        params: the parameters, before or after the updates.
        eps: that of the optimizer; only 'at_floor' needs it.
        groups: whether to add the same scalars per top-level key of params, as `f"{key}/{name}"`.

    Returns:
        A dict of float32 scalars, whose keys depend only on structures, shapes and dtypes:

        - 'update_norm', 'param_norm': global 2-norms of updates and params;
        - 'update_to_weight': their ratio, about 1e-3 as a rule of thumb; inf if all parameters
          are 0;
        - 'lost', if there are bfloat16 or float16 parameters: the fraction of their nonzero updates
          that do not change the parameter. With `param_rounding` "stochastic" and "exact" it is 0,
          unless a later transformation scales the updates: then training stalls;
        - 'at_floor': the fraction of elements whose infinity norm is at its lower bound, eps,
          which have had no gradient well above eps for a long time;
        - 'saturated', only with `moment_dtype="uint8"`: the fraction at the upper bound,
          `eps * 2**42.5`. Their steps are too small: raise eps, or clip or scale the gradients.

        Fractions are of the elements that have moments. Squares are summed in float32, for elements
        between 1e-19 and 1e19. Inside `jax.shard_map` the scalars are those of a shard.

    Raises:
        TypeError: there is no `AdamaxState` in `state`, or its moments are in no format.
    """
    eps = jnp.asarray(_checks.hyperparameter("eps", eps), jnp.float32)
    terms = [
        *_squares("update", updates),
        *_squares("param", params),
        *_lost(updates, params),
        *_fractions(state, eps),
    ]
    fractions = dict.fromkeys(name for _, name, _ in terms if name in ("at_floor", "saturated"))

    def of(key: str | None) -> dict[str, jax.Array]:
        found = defaultdict(list)
        for group, name, x in terms:
            if key in (None, group):
                found[name].append(x)
        update, param = jnp.sqrt(_sum(found["update"])), jnp.sqrt(_sum(found["param"]))
        result = {
            "update_norm": update,
            "param_norm": param,
            "update_to_weight": update / jnp.where(update == 0, 1, param),
        }
        if found["changes"]:
            result["lost"] = _sum(found["lost"]) / jnp.maximum(_sum(found["changes"]), 1)
        if found["elements"]:
            elements = _sum(found["elements"])
            result |= {name: _sum(found[name]) / elements for name in fractions}
        return result

    result = of(None)
    keys = dict.fromkeys(key for key, name, _ in terms if name == "param" and key is not None)
    for key in keys if groups else ():
        result |= {f"{key}/{name}": value for name, value in of(key).items()}
    return result


def _squares(name: str, tree: Any) -> Iterator[Term]:
    """The squared 2-norm of each leaf of real or complex numbers."""
    for path, x in tree_leaves_with_path(_paths.pure(tree)):
        x = _checks.as_array(x)
        if _checks.kind_of(x) in ("real", "complex"):
            size = jnp.abs(x).astype(jnp.float32)
            yield _first(path), name, jnp.sum(size * size)


def _lost(updates: Any, params: Any) -> Iterator[Term]:
    """For each leaf narrower than 32 bits, the nonzero updates and those that are lost."""
    leaves, treedef = tree_flatten_with_path(_paths.pure(params))
    for (path, p), u in zip(leaves, treedef.flatten_up_to(_paths.pure(updates)), strict=True):
        p = _checks.as_array(p)
        if u is not None and _checks.kind_of(p) == "real" and p.dtype.itemsize < 4:
            changes = u != 0
            stays = (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype) == p
            yield _first(path), "changes", jnp.sum(changes, dtype=jnp.float32)
            yield _first(path), "lost", jnp.sum(changes & stays, dtype=jnp.float32)


def _fractions(state: Any, eps: jax.Array) -> Iterator[Term]:
    """For each leaf that trains, the number of elements and of those at a bound of the norm."""
    states = [x for x in jax.tree.leaves(_paths.pure(state), is_leaf=is_state) if is_state(x)]
    if not states:
        raise TypeError(f"state must contain an AdamaxState; this {type(state).__name__} has none")
    for s in states:
        for path, mu, nu in _leaves.moment_rows(s.mu, s.nu):
            if not mu.size or not _leaves.trains(mu, nu):
                continue
            fmt = _leaves.format_of(path, mu, nu, s.nu_scale)
            _, u = fmt.decode(mu, nu, s.nu_scale, jnp.float32)
            floor = eps * jnp.float32(fmt.floor_tolerance)
            chosen = {"at_floor": u.astype(jnp.float32) <= floor} | fmt.saturated(mu, nu)
            # As a float, because it may exceed int32.
            yield _first(path), "elements", jnp.float32(float(mu.size))
            for name, x in chosen.items():
                yield _first(path), name, jnp.sum(x, dtype=jnp.float32)


def _sum(terms: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack([jnp.float32(0), *terms]))


def _first(path: KeyPath) -> str | None:
    return keystr(path[:1], simple=True) if path else None
