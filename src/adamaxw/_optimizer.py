"""The gradient transformations: hyperparameters and trees; the formula is in `_rule`."""

from collections.abc import Callable
from functools import partial
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamaxw import _checks, _formats, _leaves, _noise, _places, _rounding, masks
from adamaxw._rule import Constants, DecayRate, Scalar, bias_correction, cast, next_step, shrink
from adamaxw._state import AdamaxState

# Outside jit, larger trees are updated leaf by leaf if their moments are rounded at random: the
# time and memory that XLA takes to compile grow with the square of the number of operations, to
# minutes and 20 GB for 2,566 leaves.
_MOST_LEAVES = 500


def adamaxw(
    learning_rate: jax.typing.ArrayLike | optax.Schedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike | optax.Schedule = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    moment_dtype: Any = None,
    param_rounding: str = "nearest",
    scale_decay_by_lr: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adamax with decoupled weight decay.

    At step t = 1, 2, ... a parameter p with gradient g becomes

        m_t = b1 m_{t-1} + (1 - b1) g_t
        u_t = max(b2 u_{t-1}, |g_t| + eps)
        p_t = p_{t-1} - lr_t (m_t / ((1 - b1^t) u_t) + wd_t p_{t-1})

    in float32, whatever the dtype of parameters and gradients (float64 for float64 parameters).
    The updates have the dtype of the gradients, or float32 where `param_rounding` needs it.

    Args:
        learning_rate: lr, a number, a scalar array, or a schedule: a function of the number of
            updates done, 0 at the first.
        b1: decay rate of the first moment, 0 <= b1 < 1; a number or a scalar array.
        b2: decay rate of the infinity norm, 0 <= b2 <= 1; likewise.
        eps: lower bound of the infinity norm, at least 1e-30; likewise.
        weight_decay: wd, strength of the decay; a number, a scalar array or a schedule.
        mask: which parameters decay: None (all), a tree of booleans with the structure of params or
            a prefix of it, or a function from params to such a tree. The others are updated without
            decay. A single boolean is refused beside hyperparameters that are JAX arrays, because
            optax.inject_hyperparams may have made it of a function.
        moment_dtype: how the moments of real parameters are stored between steps. None: in the
            dtype of the arithmetic, 8 bytes per float32 parameter. "bfloat16" or the dtype: 4
            bytes. "uint8" or the dtype: 2 bytes, with the norm within 5.9% of the exact one however
            many steps, up to `eps * 2**42.5`; for b1 up to about 0.95, b2 from 0.98 and eps from
            1e-10 to 1e25.
        param_rounding: how the new value of a bfloat16 or float16 parameter is rounded when
            `optax.apply_updates` stores it. "nearest": steps below 1/512 of a bfloat16 parameter
            are lost. "stochastic": at random, without bias; updates are float32 if gradient and
            parameter have the two different 16-bit dtypes. "exact": bfloat16 parameters keep 16
            more bits in the state and train like float32 ones; their updates are float32. With the
            last two, no later transformation may change updates.
        scale_decay_by_lr: if False, the decay is `wd_t p_{t-1}` without lr_t, the decoupling of
            Loshchilov & Hutter; a schedule as `weight_decay` is then their schedule multiplier.

    Returns:
        A transformation with the state `AdamaxState`. Its `update` needs params. A parameter whose
        gradient is None stays as it is, and so do integer and boolean parameters, whose gradient
        is `float0` or an integer: their updates are None and zero.

    Raises:
        TypeError: a hyperparameter is no real scalar, or narrower than float32.
        ValueError: an argument is out of bounds. `init` and `update` raise a TypeError where the
            dtype of a leaf does not fit, and a ValueError where structures or shapes do not.

    Source:
        Kingma & Ba 2015, Algorithm 2 (https://arxiv.org/abs/1412.6980), with eps inside the maximum
        as in PyTorch and Optax; Loshchilov & Hutter 2019, Algorithm 2
        (https://arxiv.org/abs/1711.05101).

    Examples:
        >>> import adamaxw
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import optax
        >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
        >>> solver = adamaxw.adamaxw(learning_rate=0.003)
        >>> params = jnp.array([1., 2., 3.])
        >>> print('Objective function: ', f(params))
        Objective function:  14.0
        >>> opt_state = solver.init(params)
        >>> for _ in range(5):
        ...  grad = jax.grad(f)(params)
        ...  updates, opt_state = solver.update(grad, opt_state, params)
        ...  params = optax.apply_updates(params, updates)
        ...  print('Objective function: {:.2E}'.format(f(params)))
        Objective function: 1.40E+01
        Objective function: 1.39E+01
        Objective function: 1.39E+01
        Objective function: 1.39E+01
        Objective function: 1.38E+01
    """
    if not isinstance(scale_decay_by_lr, bool):
        raise TypeError(f"scale_decay_by_lr must be a bool, got {scale_decay_by_lr!r}")
    masks.refuse_called_mask(mask, (learning_rate, b1, b2, eps, weight_decay))
    decay = _checks.hyperparameter("weight_decay", weight_decay), scale_decay_by_lr, mask
    return _transformation(learning_rate, (b1, b2, eps), decay, moment_dtype, param_rounding)


def adamax(
    learning_rate: jax.typing.ArrayLike | optax.Schedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    moment_dtype: Any = None,
    param_rounding: str = "nearest",
) -> optax.GradientTransformationExtraArgs:
    """Adamax: `adamaxw` without weight decay, and with the same arguments, errors and state.

    Its `update` needs params only if `param_rounding` is "stochastic" or "exact". Kingma & Ba 2015,
    Algorithm 2 (https://arxiv.org/abs/1412.6980).

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> solver = adamaxw.adamax(learning_rate=0.5)
        >>> updates, state = solver.update(jnp.array([4.0, -0.1]), solver.init(jnp.zeros(2)))
        >>> print(updates.round(3))
        [-0.5  0.5]
    """
    return _transformation(learning_rate, (b1, b2, eps), None, moment_dtype, param_rounding)


def _transformation(
    learning_rate: Any, constants: Any, decay: Any, moment_dtype: Any, param_rounding: str
) -> optax.GradientTransformationExtraArgs:
    """`constants`: (b1, b2, eps). `decay`: (weight_decay, scale_decay_by_lr, mask), or None."""
    learning_rate = _checks.hyperparameter("learning_rate", learning_rate)
    b1, b2, eps = map(_checks.hyperparameter, ("b1", "b2", "eps"), constants)
    weight_decay, scale_decay_by_lr, mask = decay or (0.0, True, False)
    fmt = _formats.of_moment_dtype(moment_dtype, eps)
    constants = Constants(DecayRate.of(b1), DecayRate.of(b2), eps)
    param_rounding = _rounding.checked_name(param_rounding)
    is_noisy = fmt.is_noisy or param_rounding == "stochastic"

    def init(params: optax.Params) -> Any:
        mu, nu, residual = _leaves.zeros(params, fmt, param_rounding)
        # optax.tree.map_params calls init with a tree without leaves, which no mask tree matches.
        if jax.tree.leaves(params):
            masks.resolve_mask(mask, params)  # raises here if the mask does not fit
        place = _places.scalar_sharding(params, fmt.has_scale)
        seed = _noise.seed_of(params) if is_noisy else None
        count, nu_scale, seed = jax.tree.map(
            lambda x: x + jnp.zeros((), x.dtype, device=place),
            (jnp.zeros((), jnp.int32), _fresh_scale(fmt, eps), seed),
        )
        return AdamaxState(count, mu, nu, nu_scale, residual, seed)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        del extra_args
        state = _leaves.checked_state(state, fmt)
        decays = ()
        if decay is None and param_rounding == "nearest":
            params = None
        elif params is None:
            why = "weight decay" if decay else f'param_rounding="{param_rounding}"'
            raise ValueError(f"{why} needs params: call update(gradients, state, params)")
        else:
            decays = masks.resolve_mask(mask, params)
        lr = _checks.at("learning_rate", learning_rate, state.count)
        wd = _checks.at("weight_decay", weight_decay, state.count)
        decay_factor = lr * wd if decay and scale_decay_by_lr else wd
        arguments = updates, state, params, lr, decay_factor, constants, fmt, param_rounding, decays
        # Outside jit, update the tree in one compiled call. That moves all of its arguments to one
        # place, so it must not get leaves without a gradient, which may belong elsewhere.
        treedef = jax.tree.structure(updates)
        trains_all = treedef == jax.tree.structure(state.mu)
        compiles = treedef.num_leaves <= _MOST_LEAVES or not fmt.is_noisy
        if trains_all and compiles and _places.are_together((updates, state, params)):
            return _update_in_one_call(*arguments)
        return _update(*arguments)

    return optax.GradientTransformationExtraArgs(init, update)


def _fresh_scale(fmt: _formats.Format, eps: Any) -> Any:
    """The scale of a fresh state: an arbitrary unit, so no derivatives flow through it."""
    eps = jax.lax.stop_gradient(jnp.asarray(eps, jnp.float32))
    return fmt.rescale(eps, eps)


def _update(
    updates: Any,
    state: AdamaxState,
    params: Any,
    lr: Scalar,
    decay_factor: Scalar,
    constants: Constants,
    fmt: _formats.Format,
    param_rounding: str,
    decays: tuple[bool, ...],
) -> tuple[Any, AdamaxState]:
    """One step on the whole tree. If params are not needed, `params` is None and `decays` empty."""
    treedef, leaves = _leaves.side_by_side(updates, state, params, decays, fmt, param_rounding)

    # Restored scalars may be NumPy's, which promote differently and warn on overflow.
    before, scale, seed = jax.tree.map(jnp.asarray, (state.count, state.nu_scale, state.seed))
    count = jnp.minimum(before, 2**31 - 2) + 1  # saturates instead of wrapping around
    # A negative count means that the state is corrupt: the bias correction would be wrong.
    t = jnp.where(before < 0, jnp.nan, count.astype(jnp.result_type(float)))
    step_size = lr / bias_correction(cast(constants.b1, t.dtype), t)
    new_scale = None
    if scale is not None:
        eps = constants.eps
        begun = jnp.where(scale == 0, _fresh_scale(fmt, eps), scale)  # a zeroed state is fresh
        shrunk = shrink(cast(constants.b2, jnp.float32), begun)
        new_scale = fmt.rescale(shrunk, jnp.asarray(eps, jnp.float32))

    trained = [leaf for leaf in leaves if leaf.rounding is not None]
    indices, keys = repeat(None), None
    if any(fmt.is_noisy or leaf.rounding.is_noisy for leaf in trained):
        indices = iter(_noise.indices(len(trained)))
        keys = _noise.keys(jnp.uint32(0) if seed is None else seed, before)
    shared = keys, (scale, new_scale), step_size, decay_factor, constants, fmt
    rows = [
        _unchanged(leaf) if leaf.rounding is None else _step_leaf(leaf, next(indices), *shared)
        for leaf in leaves
    ]
    number = 3 if state.residual is None else 4
    updates, mu, nu, *rest = _leaves.columns(treedef, rows, number)
    return updates, AdamaxState(count, mu, nu, new_scale, rest[0] if rest else None, seed)


_update_in_one_call = jax.jit(_update, static_argnames=("fmt", "param_rounding", "decays"))


@partial(jax.jit, static_argnames="fmt")  # Traced once for all leaves of a shape.
def _step_leaf(
    leaf: _leaves.Leaf,
    index: jax.Array | None,
    keys: _noise.Keys | None,
    scales: tuple[jax.Array | None, jax.Array | None],
    step_size: Scalar,
    decay_factor: Scalar,
    constants: Constants,
    fmt: _formats.Format,
) -> tuple[Any, Any, Any, Any]:
    """Applies the rule to one leaf; returns `(update, mu, nu, residual)`.

    `index` and `keys` select its noise; `scales` holds the old scale and the new one.
    """
    rounding = leaf.rounding
    # With ZeRO-1 the state is sharded over more axes than gradient and parameter: follow the state.
    g = _places.reshard_like(leaf.g, leaf.mu)
    p = None if leaf.p is None else _places.reshard_like(leaf.p, leaf.mu)
    noise = other_noise = None
    if fmt.is_noisy or rounding.is_noisy:
        axes = _places.varying_axes(g)
        noise, other_noise = _noise.draw(keys, index, g.shape, axes)

    dtype = _formats.arithmetic(g.dtype)
    mu, nu = fmt.step(g, (leaf.mu, leaf.nu), scales, noise, constants)

    # Use the stored moments: XLA for CPUs makes one loop per result, and would compute them twice.
    ratio = fmt.ratio(mu, nu, scales[1], dtype)
    value = None if p is None else rounding.read(p, leaf.residual, ratio.dtype)
    update = next_step(
        ratio,
        value if leaf.decays else None,
        step_size=cast(step_size, ratio.dtype),
        decay_factor=cast(decay_factor, ratio.dtype),
    )
    update, residual = rounding.write(update, value, p, leaf.residual, other_noise, g.dtype)
    return _places.reshard_like(update, leaf.g, leaf.p), mu, nu, residual


def _unchanged(leaf: _leaves.Leaf) -> tuple[Any, Any, Any, Any]:
    """What `_step_leaf` would return for a leaf that does not train."""
    update = None if leaf.g is None else jnp.zeros_like(leaf.mu)
    return jax.tree.map(jnp.asarray, (update, leaf.mu, leaf.nu, leaf.residual))
