"""The moments of a state in plain numbers, and conversions between formats.

A state describes itself, so none of these functions needs the optimizer or its arguments.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves_with_path

from adamaxw import _conversion, _formats, _leaves, _noise, _paths, _places, _rounding, _torch
from adamaxw._hyperparameters import checked
from adamaxw._state import AdamaxState


class Moments(NamedTuple):
    """The contents of a state in plain numbers.

    Attributes:
        count: int32 scalar, the number of updates done.
        mu: first moments, a tree with the structure and shapes of params: float32 (float64 or
            complex where the state is). Zeros of their own dtype for integer and boolean params.
        nu: infinity norms, like `mu`, but real.
        residual: the residual of the state, unchanged.
        seed: the seed of the state, unchanged.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.count)
    mu: Any
    nu: Any
    residual: Any = None
    seed: Any = None


def unpack(state: AdamaxState) -> Moments:
    """Decodes the moments of a state in any format.

    Args:
        state: an `AdamaxState`; inside a chain it is one element of the state. It may be traced,
            and may hold Variables of Flax NNX, which the result does not.

    Returns:
        The moments. With `moment_dtype="uint8"`, `nu` is at least about eps, even before the first
        step, and `mu` is NaN where a gradient was not finite.

    Raises:
        TypeError: `state` is not an AdamaxState, or a leaf is in no format; names the path.

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> opt = adamaxw.adamax(0.1, moment_dtype="uint8")
        >>> _, state = opt.update(jnp.array([4.0, -0.1]), opt.init(jnp.zeros(2)))
        >>> print(*(f"{u:.2f}" for u in adamaxw.moments.unpack(state).nu))
        3.79 0.11
    """
    _check_state(state)
    state = _paths.pure(state)

    def decode(path: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
        fmt = _leaves.format_of(path, mu, nu, state.nu_scale)
        return fmt.decode(mu, nu, state.nu_scale, jnp.float32)

    mu, nu = _leaves.map_moments(decode, state.mu, state.nu)
    return Moments(state.count, mu, nu, state.residual, state.seed)


def pack(
    moments: Moments, moment_dtype: Any = None, eps: jax.typing.ArrayLike = 1e-8
) -> AdamaxState:
    """Encodes moments as a state in the given format; the inverse of `unpack`.

    Values are rounded to nearest. Unpacked and packed again in its own format, a state stays the
    same, except that bfloat16 norms are rounded once more, and that `moment_dtype=None` drops the
    seed: `param_rounding="stochastic"` then draws the noise of seed 0.

    Args:
        moments: what `unpack` returns, or `Moments` of your own, in any floating dtypes.
        moment_dtype: None, bfloat16 or uint8, as in `adamaxw.adamaxw`.
        eps: the eps of the optimizer that will take the state. It matters for uint8 alone, whose
            norms range from eps to `eps * 2**42.5`.

    Returns:
        The state, with float64 moments only where `moments` has them and `moment_dtype` is None.

    Raises:
        TypeError: `moments` is not a Moments, or a leaf does not fit the format; names the path.
        ValueError: `moment_dtype` is none of the three, eps is out of bounds, or the trees differ.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments must be Moments, as unpack returns, got {type(moments).__name__}")
    _leaves.check_count("count", moments.count)
    eps = checked("eps", eps)
    fmt = _formats.named(moment_dtype, eps)

    def widen(path: Any, m: Any, u: Any) -> tuple[Any, Any]:
        name = keystr(path)
        is_inexact = jnp.issubdtype(m.dtype, jnp.inexact) and jnp.issubdtype(u.dtype, jnp.floating)
        if not is_inexact or fmt.dtypes(m.dtype) is None:
            raise TypeError(
                f"mu{name} is {m.dtype} and nu{name} {u.dtype}, which moment_dtype={fmt.name} "
                "cannot hold"
            )
        first, norm = _formats.WIDE.dtypes(m.dtype)
        # A code cannot show that a norm is not finite or negative: the first moment does.
        m = jnp.where(jnp.isfinite(u) & (u >= 0), m.astype(first), jnp.nan)
        return m, u.astype(norm)

    mu, nu = _leaves.map_moments(widen, moments.mu, moments.nu)
    scale = None
    if fmt.has_scale:
        # The largest norm sets the grid, so that norms that are on a grid already do not change.
        norms = [x for x in jax.tree.leaves(nu) if jnp.issubdtype(x.dtype, jnp.floating)]
        norms = [x.astype(jnp.float32) for x in norms]
        largest = [jnp.max(x, initial=0, where=jnp.isfinite(x)) for x in norms]
        if not any(isinstance(x, Tracer) for x in largest) and not _places.lie_together(largest):
            # No single call takes arrays on several devices.
            largest = [jnp.float32(float(x)) for x in largest]
        top = jnp.max(jnp.stack([jnp.float32(0), *largest]))
        scale = fmt.rescale(top, jnp.asarray(eps, jnp.float32))

    def encode(_: Any, m: Any, u: Any) -> tuple[Any, Any]:
        return fmt.encode(m, u, scale, _formats.TO_NEAREST)

    mu, nu = _leaves.map_moments(encode, mu, nu)
    count = jnp.asarray(moments.count, jnp.int32)
    seed = None
    if fmt.is_noisy:
        seed = jnp.zeros((), jnp.uint32) if moments.seed is None else moments.seed
    return AdamaxState(count, mu, nu, scale, moments.residual, seed)


def convert(state: Any, like: Any) -> Any:
    """Converts the state of one optimizer so that another one can continue the run.

    Moments are converted wherever they are in a tree of wrappers: states of `adamaxw` and `adamax`,
    ours in any format and Optax's, in either direction. Everything else is kept, such as what
    `optax.MultiSteps` has accumulated and the hyperparameters of `optax.inject_hyperparams`.

    Args:
        state: the state of the old optimizer; it may be traced. Or `Moments`, which replace those
            of the one AdaMax in `like`; everything else is then taken from `like`.
        like: what `init` of the new optimizer returns for the same parameters. Only the value of
            `nu_scale` is used, for eps: unless `moment_dtype` is None it must be an array, which
            may be traced. All other leaves may be `jax.ShapeDtypeStruct`.

    Returns:
        The state, with the structure and dtypes of `like` and the shardings of `state`. It may
        share arrays with `state` (with `like` for Moments): do not donate both. Values are rounded
        to nearest, or not at all if the format stays. A residual is kept; a new one is zeros.

    Raises:
        TypeError: where one state has moments, the other is that of another optimizer; or a leaf
            cannot be kept. Names the path.
        ValueError: the trees differ in structure, or leaves in shape; `like` has no room for a
            residual or a moment; or, unless traced, `state` is that of Optax's adam, or its
            schedules have another count than its moments. Names the path.

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> import optax
        >>> params = jnp.ones(3)
        >>> state = optax.chain(optax.clip(1.0), optax.adamaxw(1e-3)).init(params)
        >>> opt = optax.chain(optax.clip(1.0), adamaxw.adamaxw(1e-3, moment_dtype="uint8"))
        >>> state = adamaxw.moments.convert(state, opt.init(params))
        >>> print(state[1].count, state[1].nu.dtype)
        0 uint8
    """
    state, goal = _paths.pure(state), _paths.pure(like)
    name = "state"
    if isinstance(state, Moments):
        name, state = "like", _conversion.put(pack(state), goal)
    for path, x in tree_leaves_with_path(state):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name}{keystr(path)} must be an array, got {x}; for types alone: "
                "jax.eval_shape(lambda state: convert(state, like), state)"
            )
    leaves = _conversion.convert(state, goal, _in_format_of)
    return jax.tree.structure(like).unflatten(leaves)


def from_torch(
    state: Mapping[str, Any],
    params: Any,
    names: Mapping[str, int | str | None],
    transposes: Mapping[str, tuple[int, ...]] | None = None,
) -> Moments:
    """Reads the moments from the state of a `torch.optim.Adamax`.

    Args:
        state: its `state_dict()`, with `tensor.float().numpy()` in place of each tensor; or a flat
            dict, as from `safetensors.numpy.load_file`, with keys such as "state.0.exp_avg" or
            "state.dense.weight.exp_avg", which end in exp_avg, exp_inf and step.
            docs/conversions.md has the lines that write either.
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        names: from the path of each leaf of params, with keys joined by "/" as in "dense/kernel",
            to the number of its parameter in `state`, or to the name where `state` has names. None
            if `state` has no such parameter: its moments are zeros. Integer leaves need no name.
        transposes: from the path of a leaf to the axes, as in `np.transpose`, that bring the
            parameter of PyTorch to the shape of the leaf: (1, 0) for a dense kernel of Flax,
            (2, 3, 1, 0) for a convolution kernel.

    Returns:
        The moments for `convert` or `pack`: float32 (float64 for float64 params), placed as params.

    Raises:
        TypeError: an array is not a NumPy array, such as a tensor of PyTorch, or it is not real.
        ValueError: names, transposes, params and `state` do not match, without leftovers; a shape
            differs; parameters differ in their number of steps; or `state` is that of Adam.

    Examples:
        >>> import adamaxw
        >>> import numpy as np
        >>> slots = {"step": 7, "exp_avg": np.ones((2, 3)), "exp_inf": np.full((2, 3), 2.0)}
        >>> params = {"kernel": np.ones((3, 2), np.float32)}
        >>> moments = adamaxw.moments.from_torch(
        ...     {"state": {0: slots}}, params, {"kernel": 0}, {"kernel": (1, 0)}
        ... )
        >>> print(moments.count, moments.nu["kernel"].shape)
        7 (3, 2)
    """
    return Moments(*_torch.read(state, params, names, transposes or {}))


def _in_format_of(state: AdamaxState, like: AdamaxState | None, like_name: str) -> AdamaxState:
    """See `_conversion.Reformat`."""
    if like is None:
        return state if state.nu_scale is None else pack(unpack(state))

    def dtypes(state: AdamaxState) -> list[Any]:
        return [x.dtype for x in jax.tree.leaves((state.mu, state.nu, state.nu_scale))]

    if dtypes(state) == dtypes(like):
        return state
    moments, eps = unpack(state), 1e-8 if like.nu_scale is None else like.nu_scale
    rows = zip(jax.tree.leaves(like.mu), jax.tree.leaves(like.nu), strict=True)
    formats = {_leaves.stored_format(m, u) for m, u in rows if _leaves.trains(m, u)}
    if not formats:
        return state._replace(nu_scale=like.nu_scale)
    fmt, *others = formats
    if others or fmt is None or fmt.has_scale != (like.nu_scale is not None):
        raise TypeError(f"{like_name} is no state that init has made: its moments have no format")
    if isinstance(eps, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{like_name}.nu_scale must be an array, which says eps, got {eps}. Without the memory "
            "for a state: jax.jit(lambda state, params: convert(state, opt.init(params)))"
        )
    return pack(moments, fmt.name, eps if isinstance(eps, Tracer) else float(eps))


def restart(state: Any) -> Any:
    """Resets a state in the middle of a run: moments and counts become zero.

    For runs that start a fresh optimizer now and again: warm restarts, and the inner loops of
    federated averaging and DiLoCo. Unlike `init`, it keeps the residual of `param_rounding="exact"`
    and with it the low bits of the weights, and draws new noise even if no parameter has changed.

    Args:
        state: an `AdamaxState`, or the state of a wrapper or chain that contains one or several.
            It may be traced.

    Returns:
        The state, with the same structure, shapes, dtypes and shardings. What is outside of any
        `AdamaxState` is kept, such as what `optax.MultiSteps` has accumulated.

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> opt = adamaxw.adamax(0.5)
        >>> _, state = opt.update(jnp.ones(2), opt.init(jnp.zeros(2)))
        >>> print(adamaxw.moments.restart(state).count)
        0
    """

    def anew(node: Any) -> Any:
        if not isinstance(node, AdamaxState):
            return node
        (count,) = jax.tree.leaves(node.count)
        seed = jax.tree.map(lambda seed: _noise.next_seed(seed, count), node.seed)
        zeros = jax.tree.map(jnp.zeros_like, node._replace(residual=None))
        return zeros._replace(residual=node.residual, seed=seed)

    return jax.tree.map(anew, state, is_leaf=lambda node: isinstance(node, AdamaxState))


def master_params(params: Any, state: AdamaxState) -> Any:
    """The float32 weights of a run with `param_rounding="exact"`.

    Args:
        params: the parameters that go with the state. Both may hold Variables of Flax NNX, which
            the result does not.
        state: an `AdamaxState`; inside a chain it is one element of the state.

    Returns:
        params, with float32 in place of each bfloat16 leaf that has a residual; rounded to bfloat16
        they are params again. On meshes with explicit axes, they are sharded like the residuals.

    Raises:
        TypeError: `state` is not an AdamaxState.
        ValueError: params and the residual differ in structure or shape, or a dtype is wrong.
    """
    _check_state(state)
    params, state = _paths.pure(params), _paths.pure(state)
    if state.residual is None:
        return params
    _leaves.check_structures("params", params, "state.residual", state.residual)
    leaves, treedef = tree_flatten_with_path(params)
    new = []
    for (path, p), residual in zip(leaves, jax.tree.leaves(state.residual), strict=True):
        shape = getattr(residual, "shape", ())
        if _leaves.is_array(p, jnp.bfloat16, shape) and _leaves.is_array(
            residual, jnp.int16, shape
        ):
            p = _rounding.join(_places.lie_like(p, residual), residual)
        elif not _leaves.is_array(residual, jnp.int8, shape):
            raise ValueError(
                f"params{keystr(path)} must be bfloat16 of shape {shape}, like its residual, which "
                f"is int16, got {_leaves.describe(p)} and {_leaves.describe(residual)}"
            )
        new.append(p)
    return treedef.unflatten(new)


def _check_state(state: Any) -> None:
    if not isinstance(state, AdamaxState):
        raise TypeError(
            f"state must be an AdamaxState, got a {type(state).__name__}; find it in the state of "
            "a wrapper or chain, such as state[1]"
        )
