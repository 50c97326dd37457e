"""The moments of a state in plain numbers, and conversions between the formats.

A state describes itself, so that nothing else is asked: not the optimizer, not its arguments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adamaxw import _formats, _hyperparameters, _leaves, _rounding
from adamaxw._optimizer import AdamaxState


class Moments(NamedTuple):
    """What a state holds, in plain numbers.

    Attributes:
        count: int32 scalar, the number of updates done.
        mu: first moments, a tree in the structure and shapes of params: float32 (float64 or complex
            where the state has that). Zeros of their dtype for integer and boolean parameters.
        nu: infinity norms, like `mu`, but real.
        residual: that of the state, as it is.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.count)
    mu: Any
    nu: Any
    residual: Any = None


def unpack(state: AdamaxState) -> Moments:
    """The moments of a state, whatever its format.

    Args:
        state: an `AdamaxState`; inside a chain it is one element of the state. It may be traced.

    Returns:
        The moments. With `moment_dtype="uint8"`, `nu` is at least about eps, also before the first
        step, and elements whose gradient was not finite are NaN in `mu`.

    Raises:
        TypeError: it is no AdamaxState, or a leaf is in no format; names the path.

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> opt = adamaxw.adamax(0.1, moment_dtype="uint8")
        >>> _, state = opt.update(jnp.array([4.0, -0.1]), opt.init(jnp.zeros(2)))
        >>> print(*(f"{u:.2f}" for u in adamaxw.moments.unpack(state).nu))
        3.79 0.11
    """
    _check_state(state)

    def decode(path: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
        fmt = _leaves.stored_format(mu, nu)
        if fmt is None or fmt.has_scale != _leaves.is_float32_scalar(state.nu_scale):
            name = jax.tree_util.keystr(path)
            raise TypeError(
                f"state.mu{name} and state.nu{name} are no moments of any format, with nu_scale "
                f"{_leaves.describe(state.nu_scale)}: {_leaves.describe(mu)} and "
                f"{_leaves.describe(nu)}"
            )
        return fmt.decode(mu, nu, state.nu_scale, jnp.float32)

    mu, nu = _leaves.map_moments(decode, state.mu, state.nu)
    return Moments(state.count, mu, nu, state.residual)


def pack(
    moments: Moments, moment_dtype: Any = None, eps: jax.typing.ArrayLike = 1e-8
) -> AdamaxState:
    """A state in another format, with which to train on; the inverse of `unpack`.

    Values are rounded to the nearest. `pack(unpack(state), moment_dtype)` of a state that is in
    that format already gives it back, except that bfloat16 norms are rounded once more.

    Args:
        moments: what `unpack` returns, or `Moments` of your own, in any floating dtypes.
        moment_dtype: None, bfloat16 or uint8, as in `adamaxw.adamaxw`.
        eps: that of the optimizer which will go on; only uint8 asks for it, which holds no norm
            below it and none above `eps * 2**42.5`.

    Returns:
        The state, with float64 moments only where `moments` has them and `moment_dtype` is None.

    Raises:
        TypeError: `moments` is no Moments, or a leaf does not fit the format; names the path.
        ValueError: `moment_dtype` is none of the three, eps is out of bounds, or the trees differ.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be Moments, as unpack returns, got {type(moments).__name__}")
    count = moments.count
    if not (isinstance(count, int) or jnp.issubdtype(jnp.result_type(count), jnp.integer)):
        raise TypeError(f"count must be an integer, got {_leaves.describe(count)}")
    fmt = _formats.named(moment_dtype)
    eps = _hyperparameters.checked("eps", eps)
    _formats.check_eps(fmt, eps)
    unit = jnp.asarray(eps, jnp.float32)

    def widen(path: Any, m: Any, u: Any) -> tuple[Any, Any]:
        name = jax.tree_util.keystr(path)
        is_inexact = jnp.issubdtype(m.dtype, jnp.inexact) and jnp.issubdtype(u.dtype, jnp.floating)
        if not is_inexact or fmt.dtypes(m.dtype) is None:
            raise TypeError(
                f"mu{name} is {m.dtype} and nu{name} {u.dtype}, which moment_dtype={fmt.name} "
                "cannot hold"
            )
        first, norm = _formats.WIDE.dtypes(m.dtype)
        # What is no norm must show, though its code could not.
        m = jnp.where(jnp.isfinite(u) & (u >= 0), m.astype(first), jnp.nan)
        return m, u.astype(norm)

    mu, nu = _leaves.map_moments(widen, moments.mu, moments.nu)
    scale = None
    if fmt.has_scale:
        # The largest norm sets the grid: norms that lie on one already stay what they are.
        norms = [x.astype(jnp.float32) for x in _leaves.inexact(nu)]
        largest = [jnp.max(x, initial=0, where=jnp.isfinite(x)) for x in norms]
        top = jnp.max(jnp.stack([jnp.float32(0), *largest]))
        scale = fmt.rescale(top, unit)

    def encode(path: Any, m: Any, u: Any) -> tuple[Any, Any]:
        del path
        return fmt.encode(m, u, scale, _formats.TO_NEAREST)

    mu, nu = _leaves.map_moments(encode, mu, nu)
    count = jnp.asarray(count, jnp.int32)
    return AdamaxState(count, mu, nu, scale, moments.residual)


def master_params(params: Any, state: AdamaxState) -> Any:
    """The float32 weights of a run with `param_rounding="exact"`.

    Args:
        params: the parameters that go with the state.
        state: an `AdamaxState`; inside a chain it is one element of the state.

    Returns:
        params, with float32 in place of each bfloat16 leaf that has a residual. Rounded to bfloat16
        they are params.

    Raises:
        TypeError: it is no AdamaxState.
        ValueError: params and the state's residual differ in structure or shapes.
    """
    _check_state(state)
    if state.residual is None:
        return params

    def master(path: Any, p: Any, residual: Any) -> Any:
        if residual is None:
            return p
        if getattr(p, "dtype", None) != jnp.bfloat16 or p.shape != residual.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must be bfloat16 of shape {residual.shape}, "
                f"like its residual, got {_leaves.describe(p)}"
            )
        return _rounding.join(p, residual)

    _leaves.broadcast("params", params, "state.residual", state.residual, lambda x: x is None)
    return jax.tree_util.tree_map_with_path(master, params, state.residual)


def _check_state(state: Any) -> None:
    if not isinstance(state, AdamaxState):
        raise TypeError(
            f"state must be an AdamaxState, got a {type(state).__name__}; find it in the state of "
            "a wrapper or chain, such as state[1]"
        )
