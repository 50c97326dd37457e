"""What the optimizer does, as a few scalars for a logger."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamaxw import _hyperparameters, _leaves, _paths
from adamaxw._optimizer import AdamaxState

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
    """Scalars that show how training goes, for any logger; cheap, and meant for inside `jax.jit`.

    Args:
        updates: what `update` returned. None and integers in it do not count.
        state: the state that it returned: an `AdamaxState`, or the state of a wrapper or chain that
            holds one or several, such as `nnx.Optimizer.opt_state`.
        params: the parameters, before the updates or after.
        eps: that of the optimizer; 'at_floor' alone needs it.
        groups: whether to add the same, as `f"{key}/{name}"`, of each key at the top of params that
            has real or complex parameters.

    Returns:
        A dict of float32 scalars, whose keys depend on the format of the state alone:

        - 'update_norm', 'param_norm': global 2-norms of updates and params;
        - 'update_to_weight': the first over the second; 1e-3 or so, as a rule of thumb; inf where
          all parameters are 0;
        - 'at_floor': the fraction of elements whose infinity norm is at its lower bound, eps. They
          have not seen a gradient that counts, for long;
        - 'saturated', with `moment_dtype="uint8"` alone: the fraction of those at the upper bound,
          `eps * 2**42.5`. Their steps are too small: raise eps, or clip or scale the gradients.

        Fractions are of the elements that train; in a group where none does, they are 0.

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
    floor = _hyperparameters.checked("eps", eps) * _AT_FLOOR
    squares = {
        "update_norm": _squares("updates", updates),
        "param_norm": _squares("params", params),
    }
    trained = list(_trained(state, floor))

    def of(group: str | None) -> dict[str, jax.Array]:
        result = {name: jnp.sqrt(_total(terms, group)) for name, terms in squares.items()}
        update, param = result.values()
        result["update_to_weight"] = jnp.where(update == 0, 0, update / param)
        size = jnp.maximum(_total([(path, n) for path, n, _ in trained], group), 1)
        for name in dict.fromkeys(name for *_, fractions in trained for name in fractions):
            counts = [(path, n * x[name]) for path, n, x in trained if name in x]
            result[name] = _total(counts, group) / size
        return result

    result = of(None)
    for group in dict.fromkeys(_group(path) for path, _ in squares["param_norm"]) if groups else ():
        result |= {f"{group}/{name}": value for name, value in of(group).items()}
    return result


def _group(path: str) -> str:
    return path.split("/")[0]


def _total(terms: list[tuple[str, Any]], group: str | None) -> jax.Array:
    """The sum of all terms, or of those of a group."""
    chosen = [jnp.float32(term) for path, term in terms if group in (None, _group(path))]
    return jnp.sum(jnp.stack([jnp.float32(0), *chosen]))


def _squares(name: str, tree: Any) -> list[tuple[str, jax.Array]]:
    """The path of each leaf of real or complex numbers with its squared 2-norm."""
    terms = []
    for path, x in _paths.named(tree):
        x = _leaves.as_array(x)
        if not _leaves.is_numeric(x):
            raise TypeError(f"{name} must hold arrays, got {_leaves.describe(x)} at {path!r}")
        if jnp.issubdtype(x.dtype, jnp.inexact):
            size = jnp.abs(x).astype(jnp.float32)
            terms.append((path, jnp.sum(size * size)))
    return terms


def _trained(state: Any, floor: Any) -> Iterator[tuple[str, int, dict[str, jax.Array]]]:
    """The path, size and fractions of each leaf that trains."""
    states = jax.tree.leaves(_paths.pure(state), is_leaf=_is_state)
    states = [x for x in states if _is_state(x)]
    if not states:
        raise TypeError(
            f"state must be an AdamaxState or hold one; there is none in this "
            f"{type(state).__name__}"
        )
    for s in states:
        for (path, mu), (_, nu) in zip(_paths.named(s.mu), _paths.named(s.nu), strict=True):
            fmt = _leaves.stored_format(mu, nu)
            if fmt is None or not mu.size:
                continue
            _, u = fmt.decode(mu, nu, s.nu_scale, jnp.float32)
            chosen = {"at_floor": u <= floor} | fmt.saturated(mu, nu)
            yield path, mu.size, {k: jnp.mean(x, dtype=jnp.float32) for k, x in chosen.items()}


def _is_state(x: Any) -> bool:
    return isinstance(x, AdamaxState)
