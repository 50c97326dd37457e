"""The moments of a state in plain numbers, and conversions between the formats.

A state describes itself, so that nothing else is asked: not the optimizer, not its arguments.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves_with_path

from adamaxw import _conversion, _formats, _leaves, _paths, _places, _rounding, _torch
from adamaxw._hyperparameters import checked
from adamaxw._optimizer import AdamaxState


class Moments(NamedTuple):
    """What a state holds, in plain numbers.

    Attributes:
        count: int32 scalar, the number of updates done.
        mu: first moments, a tree in the structure and shapes of params: float32 (float64 or complex
            where the state has that). Zeros of their dtype for integer and boolean parameters.
        nu: infinity norms, like `mu`, but real.
        residual: that of the state, as it is.
        seed: likewise.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.count)
    mu: Any
    nu: Any
    residual: Any = None
    seed: Any = None


def unpack(state: AdamaxState) -> Moments:
    """The moments of a state, whatever its format.

    Args:
        state: an `AdamaxState`; inside a chain it is one element of the state. It may be traced,
            and may hold Variables of Flax NNX, which are left out.

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
    state = _paths.pure(state)

    def decode(path: Any, mu: Any, nu: Any) -> tuple[Any, Any]:
        fmt = _leaves.format_of(path, mu, nu, state.nu_scale)
        return fmt.decode(mu, nu, state.nu_scale, jnp.float32)

    mu, nu = _leaves.map_moments(decode, state.mu, state.nu)
    return Moments(state.count, mu, nu, state.residual, state.seed)


def pack(
    moments: Moments, moment_dtype: Any = None, eps: jax.typing.ArrayLike = 1e-8
) -> AdamaxState:
    """A state in another format, with which to train on; the inverse of `unpack`.

    Values are rounded to the nearest. `pack(unpack(state), moment_dtype)` of a state that is in
    that format already gives it back, except that bfloat16 norms are rounded once more, and that
    `moment_dtype=None` has no seed: the noise of "stochastic" is then that of a seed of 0.

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
    _leaves.check_count("count", moments.count)
    eps = checked("eps", eps)
    fmt = _formats.named(moment_dtype, eps)
    unit = jnp.asarray(eps, jnp.float32)

    def widen(path: Any, m: Any, u: Any) -> tuple[Any, Any]:
        name = keystr(path)
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
        if not any(isinstance(x, Tracer) for x in largest) and not _places.lie_together(largest):
            # Leaves on several devices, which no one call takes.
            largest = [jnp.float32(float(x)) for x in largest]
        top = jnp.max(jnp.stack([jnp.float32(0), *largest]))
        scale = fmt.rescale(top, unit)

    def encode(_: Any, m: Any, u: Any) -> tuple[Any, Any]:
        return fmt.encode(m, u, scale, _formats.TO_NEAREST)

    mu, nu = _leaves.map_moments(encode, mu, nu)
    count = jnp.asarray(moments.count, jnp.int32)
    seed = None
    if fmt.is_noisy:
        seed = jnp.zeros((), jnp.uint32) if moments.seed is None else moments.seed
    return AdamaxState(count, mu, nu, scale, moments.residual, seed)


def convert(state: Any, like: Any) -> Any:
    """The state of the optimizer that ran, for another optimizer to go on with.

    Moments are converted wherever they lie in a tree of wrappers: states of `adamaxw` and `adamax`,
    ours in any format and Optax's, in either direction. Everything else is kept as it is, such as
    what `optax.MultiSteps` has accumulated and the hyperparameters of `optax.inject_hyperparams`.

    Args:
        state: the state of the optimizer that ran. It may be traced. `Moments` go to the one place
            in `like` that is for moments, where everything else is taken from `like`.
        like: a state that `init` of the optimizer that goes on has made for the same parameters.
            Of its values only `nu_scale` is used, which says eps, and must be an array, traced too
            (it is None with `moment_dtype=None`); the others may be `jax.ShapeDtypeStruct`.

    Returns:
        The state in the structure and dtypes of `like`; arrays lie where those of `state` lie, and
        may be those of `state`, or of `like` where it is Moments: do not donate both. Values are
        rounded to the nearest; a format that stays is not rounded. A residual is kept, or starts
        from zeros where `state` has none.

    Raises:
        TypeError: at a place of moments is the state of another optimizer, or a leaf that cannot
            be kept; names the path.
        ValueError: the trees differ in structure, or leaves in shape; `state` is one of Optax's
            adam, or its schedules do not stand at its count, which values alone tell, so not where
            they are traced; a residual or a moment has no place in `like`. Names the path.

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
    """The moments in a state of `torch.optim.Adamax`.

    Args:
        state: its `state_dict()`, with `tensor.float().numpy()` in place of each tensor; or a dict
            without dicts in it, as from `safetensors.numpy.load_file`, with keys such as
            "state.0.exp_avg" or "state.dense.weight.exp_avg", that end in exp_avg, exp_inf and
            step. docs/conversions.md has the lines that write either.
        params: the parameters, arrays or `jax.ShapeDtypeStruct`.
        names: which parameter of `state` each leaf of params is: from its path, the keys joined by
            "/" as in "dense/kernel", to the number of the parameter, or to its name where `state`
            has names. None: `state` has nothing of it, and it starts from zeros. Integer leaves
            need no name.
        transposes: from the path of a leaf to the axes, as in `np.transpose`, that bring the
            parameter of PyTorch to the shape of the leaf: (1, 0) for a dense kernel of Flax,
            (2, 3, 1, 0) for one of a convolution.

    Returns:
        The moments, float32 (float64 for float64 params), placed like params: for `convert`, or
        `pack`.

    Raises:
        TypeError: an array is a tensor of PyTorch or something else, or not real.
        ValueError: names or transposes do not fit params or `state`, with nothing left over in any;
            a shape differs; parameters have done different numbers of steps; or `state` is one of
            Adam.

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


def _in_format_of(state: AdamaxState, like: AdamaxState, like_name: str) -> AdamaxState:
    """See `_conversion.Reformat`."""

    def dtypes(state: AdamaxState) -> list[Any]:
        return [x.dtype for x in jax.tree.leaves((state.mu, state.nu, state.nu_scale))]

    if dtypes(state) == dtypes(like):
        return state
    moments = unpack(state)
    rows = zip(jax.tree.leaves(like.mu), jax.tree.leaves(like.nu), strict=True)
    formats = {_leaves.stored_format(m, u) for m, u in rows if _leaves.trains(m, u)}
    if not formats:
        return state._replace(nu_scale=like.nu_scale)
    fmt, *others = formats
    if others or fmt is None or fmt.has_scale != (like.nu_scale is not None):
        raise TypeError(f"{like_name} is no state that init has made: its moments have no format")
    eps = 1e-8 if like.nu_scale is None else like.nu_scale
    if isinstance(eps, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{like_name}.nu_scale must be an array, which says eps, got {eps}. Without the memory "
            "for a state: jax.jit(lambda state, params: convert(state, opt.init(params)))"
        )
    return pack(moments, fmt.name, eps if isinstance(eps, Tracer) else float(eps))


def restart(state: Any) -> Any:
    """A state to begin anew with, for the parameters as they are: zero moments, a count of 0.

    For a run that goes on with a fresh optimizer now and again: a warm restart, the inner loops of
    federated averaging and DiLoCo. Unlike `init`, it keeps the residual of `param_rounding="exact"`
    and with it the low bits of the weights, and draws new noise even if no parameter has changed.

    Args:
        state: an `AdamaxState`, or the state of a wrapper or chain with one or several in it. It
            may be traced.

    Returns:
        The state, in the same structure, shapes, dtypes and shardings. What is in no `AdamaxState`
        is kept, such as what `optax.MultiSteps` has accumulated.

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
        seed = jax.tree.map(lambda seed: _rounding.next_seed(seed, count), node.seed)
        zeros = jax.tree.map(jnp.zeros_like, node._replace(residual=None))
        return zeros._replace(residual=node.residual, seed=seed)

    return jax.tree.map(anew, state, is_leaf=lambda node: isinstance(node, AdamaxState))


def master_params(params: Any, state: AdamaxState) -> Any:
    """The float32 weights of a run with `param_rounding="exact"`.

    Args:
        params: the parameters that go with the state; like it they may hold Variables of Flax NNX,
            which are left out.
        state: an `AdamaxState`; inside a chain it is one element of the state.

    Returns:
        params, with float32 in place of each bfloat16 leaf that has a residual. Rounded to bfloat16
        they are params. Where axes of a mesh are explicit, these leaves lie like the residuals.

    Raises:
        TypeError: it is no AdamaxState.
        ValueError: params and the state's residual differ in structure or shapes.
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
