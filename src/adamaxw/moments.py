"""The moments of a state as plain numbers, and conversions between formats and optimizers.

A state describes itself: none of these functions needs the optimizer or its arguments.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from adamaxw import _bits, _checks, _conversion, _formats, _leaves, _noise, _paths, _places, _torch
from adamaxw._rounding import NEAREST
from adamaxw._state import AdamaxState, is_state


class Moments(NamedTuple):
    """The contents of a state as plain numbers; `count`, `residual` and `seed` are unchanged.

    First moments `mu` and infinity norms `nu` have the structure and shapes of params: float32, or
    float64 or, for `mu`, complex where the state is; zeros of their own dtype for integer params.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.count)
    mu: Any
    nu: Any
    residual: Any = None
    seed: Any = None


def unpack(state: AdamaxState) -> Moments:
    """Decodes the moments of a state in any format.

    Args:
        state: an `AdamaxState`, such as `state[1]` of a chain; it may be traced or hold Variables
            of Flax NNX. With `moment_dtype="uint8"`, `nu` is at least about eps even before the
            first step, and `mu` is NaN where a gradient was not finite.

    Raises:
        TypeError: `state` is not an AdamaxState, or a leaf is in no format; names the path.
    """
    state = _plain(state)

    def decode(path: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
        fmt = _leaves.format_of(path, mu, nu, state.nu_scale)
        return fmt.decode(mu, nu, state.nu_scale, jnp.float32)

    mu, nu = _leaves.map_moments(decode, state.mu, state.nu)
    return Moments(state.count, mu, nu, state.residual, state.seed)


def pack(
    moments: Moments, moment_dtype: Any = None, eps: jax.typing.ArrayLike = 1e-8
) -> AdamaxState:
    """Encodes moments as a state in the given format, rounded to nearest: the inverse of `unpack`.

    Unpacking and packing in the same format keeps uint8 codes and float32 moments bit for bit;
    `nu_scale` may change, bfloat16 norms are rounded once more, and None drops the seed.

    Args:
        moments: what `unpack` returns, or `Moments` of your own in any floating dtypes.
        moment_dtype: as in `adamaxw.adamaxw`.
        eps: that of the optimizer that will use the state; it only matters for uint8.

    Raises:
        TypeError: `moments` is not a Moments, or a leaf does not fit the format; names the path.
        ValueError: `moment_dtype` or eps is not valid, or the trees differ.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be Moments, as from unpack, got {type(moments)}")
    eps = _checks.hyperparameter("eps", eps)
    fmt = _formats.of_moment_dtype(moment_dtype, eps)
    largest: list[Any] = [jnp.float32(0)]

    def widen(path: Any, m: Any, u: Any) -> tuple[Any, Any]:
        is_inexact = jnp.issubdtype(m.dtype, jnp.inexact) and jnp.issubdtype(u.dtype, jnp.floating)
        if not is_inexact or fmt.dtypes(m.dtype) is None:
            words = f"mu{keystr(path)} is {m.dtype} and nu{keystr(path)} {u.dtype}"
            raise TypeError(f"{words}, which moment_dtype={fmt.name} cannot hold")
        first, norm = _formats.WIDE.dtypes(m.dtype)
        finite = u.astype(jnp.float32)
        largest.append(jnp.max(finite, initial=0, where=jnp.isfinite(finite)))
        # Mark invalid norms as NaN in `m`, because codes of norms cannot represent NaN.
        m = jnp.where(jnp.isfinite(u) & (u >= 0), m.astype(first), jnp.nan)
        return m, u.astype(norm)

    mu, nu = _leaves.map_moments(widen, moments.mu, moments.nu)
    scale = seed = None
    if fmt.has_scale:
        # No single call takes arrays on several devices.
        if not any(isinstance(x, Tracer) for x in largest) and not _places.are_together(largest):
            largest = [float(x) for x in largest]
        # Start the grid at the largest norm, so that norms that are on a grid do not move.
        scale = fmt.rescale(jnp.max(jnp.stack(largest)), jnp.asarray(eps, jnp.float32))
    if fmt.is_noisy:
        seed = jnp.zeros((), jnp.uint32) if moments.seed is None else moments.seed

    def encode(_: Any, m: Any, u: Any) -> tuple[Any, Any]:
        return fmt.encode(m, u, scale, _bits.TO_NEAREST)

    mu, nu = _leaves.map_moments(encode, mu, nu)
    count = jnp.asarray(moments.count, jnp.int32)
    return AdamaxState(count, mu, nu, scale, moments.residual, seed)


def convert(state: Any, like: Any) -> Any:
    """Converts the state of one optimizer so that another one can continue the run.

    States of `adamaxw` and `adamax`, ours in any format and Optax's, are converted in either
    direction wherever they are in a tree of wrappers. Everything else is kept, such as the
    gradients in `optax.MultiSteps` and the values of `optax.inject_hyperparams`.

    Args:
        state: the state of the old optimizer, which may be traced; or `Moments`, to replace those
            of the one AdaMax optimizer in `like`.
        like: what `init` of the new optimizer returns for the same parameters. Only the value of
            `nu_scale` is used, for eps; all other leaves may be `jax.ShapeDtypeStruct`.

    Returns:
        The state, with the structure and dtypes of `like` and the shardings of `state`. It may
        share arrays with either: do not donate both. Values are rounded to nearest, or not at all
        if the format stays. A residual is kept; a new one is zeros.

    Raises:
        TypeError: only one of the two is an AdaMax state, or leaves differ in dtype.
        ValueError: structures or shapes differ; `like` cannot hold a residual or a moment; or,
            unless traced, `state` is that of Optax's adam, or its counts differ. Names the path.
    """
    state, goal = _paths.pure(state), _paths.pure(like)
    if isinstance(state, Moments):
        state = _conversion.put(pack(state), goal)
    for path, x in tree_leaves_with_path(state):
        if isinstance(x, jax.ShapeDtypeStruct):  # it would come out again
            raise TypeError(f"state{keystr(path)} (for Moments, that of like) must be an array")
    return jax.tree.structure(like).unflatten(_conversion.convert(state, goal, _repack))


def from_torch(
    state: Mapping[str, Any],
    params: Any,
    names: Mapping[str, int | str | None],
    transposes: Mapping[str, tuple[int, ...]] | None = None,
) -> Moments:
    """Reads the moments from the state of a `torch.optim.Adamax`.

    Args:
        state: its `state_dict()`, with `tensor.float().numpy()` in place of each tensor; or a flat
            dict with keys such as "state.0.exp_avg", as from `safetensors.numpy.load_file`.
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        names: from the path of each leaf of params, such as "dense/kernel", to the number or name
            of its parameter in `state`; or to None if `state` has none: its moments are zeros.
        transposes: from the path of a leaf to the axes, as in `np.transpose`, that bring PyTorch's
            parameter to the shape of the leaf: (1, 0) for a dense kernel of Flax.

    Returns:
        The moments for `convert` or `pack`: float32 (float64 for float64 params), placed as params.

    Raises:
        ValueError: names, transposes, params and `state` do not match one to one; shapes or numbers
            of steps differ; or `state` is that of Adam.
    """
    return Moments(*_torch.read(state, params, names, transposes or {}))


def restart(state: Any) -> Any:
    """Resets moments and counts to zero in the middle of a run.

    For warm restarts and for the inner loops of federated averaging and DiLoCo. Unlike `init`, it
    keeps the residual of `param_rounding="exact"`, and with it the low bits of the weights, and
    draws new noise even if no parameter has changed.

    The state may be that of a wrapper or chain, and traced. Structure, shapes, dtypes and shardings
    stay, and so does everything outside of an `AdamaxState`.
    """

    def restarted(node: Any) -> Any:
        if not is_state(node):
            return node
        (count,) = jax.tree.leaves(node.count)
        seed = jax.tree.map(lambda seed: _noise.next_seed(seed, count), node.seed)
        zeros = jax.tree.map(jnp.zeros_like, node._replace(residual=None))
        return zeros._replace(residual=node.residual, seed=seed)

    return jax.tree.map(restarted, state, is_leaf=is_state)


def master_params(params: Any, state: AdamaxState) -> Any:
    """The float32 weights of a run with `param_rounding="exact"`.

    They are params, with float32 in place of each bfloat16 leaf that has a residual in the
    AdamaxState; rounded to bfloat16, ties away from zero, they are params again.

    Raises:
        TypeError: `state` is not an AdamaxState.
        ValueError: params and the residual differ in structure or shape, or a leaf with a residual
            is not bfloat16.
    """
    params, state = _paths.pure(params), _plain(state)
    if state.residual is None:
        return params
    _checks.check_structures("params", params, "state.residual", state.residual)

    def master(path: Any, p: Any, residual: Any) -> Any:
        if residual.dtype == NEAREST.residual_dtype:  # no low bits
            return p
        if not _checks.is_array(p, jnp.bfloat16, residual.shape):
            words = f"params{keystr(path)} must be bfloat16 of shape {residual.shape}"
            raise ValueError(f"{words}, like its residual, got {_checks.in_words(p)}")
        return _bits.join(_places.reshard_like(p, residual), residual)

    return tree_map_with_path(master, params, state.residual)


def _plain(state: Any) -> AdamaxState:
    """The state without the Variables of Flax NNX."""
    if not is_state(state):
        raise TypeError(f"state must be an AdamaxState, such as state[1], got {type(state)}")
    return _paths.pure(state)


def _repack(state: AdamaxState, moment_dtype: Any, eps: Any) -> AdamaxState:
    """See `_conversion.Repack`."""
    if isinstance(eps, jax.Array) and not isinstance(eps, Tracer):
        eps = float(eps)  # it may be on other devices than the state
    return pack(unpack(state), moment_dtype, eps)
