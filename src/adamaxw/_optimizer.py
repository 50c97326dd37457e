"""The gradient transformations: hyperparameters and trees; the formula is in `_rule`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamaxw import _formats, _hyperparameters, _leaves, _masking, _noise, _places, _rounding
from adamaxw._rule import Constants, Decay, Scalar, bias_correction, cast, next_step, shrink
from adamaxw._state import AdamaxState

# Outside jit, larger trees go leaf by leaf if their moments are rounded at random: XLA's time and
# memory to compile grow with the square of the operations, to minutes and 20 GB for 2,566 leaves.
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
    The updates come in the dtype of the gradients, with the one exception of
    `param_rounding="exact"`.

    Args:
        learning_rate: lr, a number, a scalar array (traced too), or a schedule: a callable that is
            given the number of updates done so far, an int32 scalar, 0 at the first.
        b1: decay rate of the first moment, 0 <= b1 < 1; a number or a scalar array.
        b2: decay rate of the infinity norm, 0 <= b2 <= 1; likewise.
        eps: lower bound of the infinity norm, at least 1e-30; likewise.
        weight_decay: wd, strength of the decay; a number, a scalar array or a schedule.
        mask: which parameters decay: None (all), a tree of booleans with the structure of params or
            a prefix of it, or a function that returns such a tree, given params. The other
            parameters are updated by Adamax all the same. A lone boolean goes only with
            hyperparameters that are no JAX arrays: else it may be what optax.inject_hyperparams
            has made of a function, and is refused.
        moment_dtype: how the moments are stored between steps. None: in the dtype of the
            arithmetic, 8 bytes a float32 parameter. "bfloat16" or the dtype: 4 bytes. "uint8" or
            the dtype: 2 bytes, the norm within 5.9% (1/12 of an octave) of the exact one however
            many steps, up to `eps * 2**42.5`; for b1 up to about 0.95, b2 from 0.98 and eps from
            1e-10 to 1e25. Only real parameters, with the last two; their steps are those of the
            moments as they are stored.
        param_rounding: how the new value of a bfloat16 or float16 parameter is rounded, which
            `optax.apply_updates` does. "nearest": steps below 1/512 of a bfloat16 parameter are
            lost. "stochastic": to one of the two neighbours at random, so that the mean is right;
            where gradient and parameter are the two different dtypes of 16 bits, the update is
            float32.
            "exact": bfloat16 parameters get 16 bits more in the state, and train as float32 ones
            that are rounded when they are used; their updates are float32. Float32 parameters are
            not touched. With the last two, no transformation after this one may change updates.
        scale_decay_by_lr: if False, the decay is `wd_t p_{t-1}` without lr_t, the decoupling of
            Loshchilov & Hutter; a schedule as `weight_decay` is then their schedule multiplier.

    Returns:
        A transformation with the state `AdamaxState`. Its `update` needs params. A parameter whose
        gradient is None stays as it is, and so do integer and boolean parameters, whose gradient
        is `float0` or an integer: their updates are None and zero.

    Raises:
        TypeError: a hyperparameter is no real scalar, or has a dtype narrower than float32; later,
            from `init` and `update`: a leaf of params, of the gradients or of the mask has a dtype
            that does not fit.
        ValueError: a hyperparameter whose value is known is out of bounds or not a scalar, or
            `moment_dtype` or `param_rounding` is none of the three; later, from `init` and
            `update`: params are missing, or trees differ in structure or shapes.

    Source:
        Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 2, with eps
        inside the maximum as in PyTorch and Optax (https://arxiv.org/abs/1412.6980); Loshchilov &
        Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2
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
    _masking.refuse_called_mask(mask, (learning_rate, b1, b2, eps, weight_decay))
    if not callable(weight_decay):
        weight_decay = _hyperparameters.checked("weight_decay", weight_decay)

    def decay(lr: Scalar, count: jax.Array) -> Scalar:
        wd = _hyperparameters.at("weight_decay", weight_decay, count)
        return lr * wd if scale_decay_by_lr else wd

    return _transformation(learning_rate, b1, b2, eps, decay, mask, moment_dtype, param_rounding)


def adamax(
    learning_rate: jax.typing.ArrayLike | optax.Schedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    moment_dtype: Any = None,
    param_rounding: str = "nearest",
) -> optax.GradientTransformationExtraArgs:
    """Adamax: `adamaxw` without weight decay.

    Args:
        learning_rate: as in `adamaxw`.
        b1: as in `adamaxw`.
        b2: as in `adamaxw`.
        eps: as in `adamaxw`.
        moment_dtype: as in `adamaxw`.
        param_rounding: as in `adamaxw`.

    Returns:
        A transformation with the state `AdamaxState`, as for `adamaxw`; its `update` does not need
        params unless `param_rounding` is "stochastic" or "exact".

    Raises:
        TypeError, ValueError: as in `adamaxw`.

    Source:
        Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 2, with eps
        inside the maximum as in PyTorch and Optax (https://arxiv.org/abs/1412.6980).

    Examples:
        >>> import adamaxw
        >>> import jax.numpy as jnp
        >>> solver = adamaxw.adamax(learning_rate=0.5)
        >>> updates, state = solver.update(jnp.array([4.0, -0.1]), solver.init(jnp.zeros(2)))
        >>> print(updates.round(3))
        [-0.5  0.5]
    """
    return _transformation(learning_rate, b1, b2, eps, None, None, moment_dtype, param_rounding)


def _transformation(
    learning_rate: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    decay: Callable[[Scalar, jax.Array], Scalar] | None,
    mask: Any,
    moment_dtype: Any,
    param_rounding: str,
) -> optax.GradientTransformationExtraArgs:
    """`adamaxw` with `decay` from the learning rate and the count, `adamax` with None."""
    if not callable(learning_rate):
        learning_rate = _hyperparameters.checked("learning_rate", learning_rate)
    b1 = _hyperparameters.checked("b1", b1)
    b2 = _hyperparameters.checked("b2", b2)
    eps = _hyperparameters.checked("eps", eps)
    fmt = _formats.named(moment_dtype, eps)
    constants = Constants(Decay.of(b1), Decay.of(b2), eps)
    rounding = _rounding.named(param_rounding)

    def init(params: optax.Params) -> Any:
        mu, nu, residual = _leaves.zeros(params, fmt, rounding)
        # A tree without leaves is also what optax.tree.map_params puts here: no mask fits that.
        if decay is not None and jax.tree.leaves(params):
            _masking.resolve_mask(mask, params)
        place = _places.scalar_sharding(params, fmt.has_scale)
        seed = _noise.seed_of(params) if fmt.is_noisy or rounding.is_noisy else None
        count, nu_scale, seed = jax.tree.map(
            lambda x: x + jnp.zeros((), x.dtype, device=place),
            (jnp.zeros((), jnp.int32), _unit(fmt, eps), seed),
        )
        return AdamaxState(count, mu, nu, nu_scale, residual, seed)

    def update(
        updates: Any,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del extra_args
        state = _checked(state, fmt)
        decays = ()
        if decay is None and not rounding.needs_params:
            params = None
        elif params is None:
            why = "adamaxw decays" if decay else f'param_rounding="{rounding.name}" rounds'
            raise ValueError(f"{why} the params: call update(gradients, state, params)")
        else:
            decays = _masking.resolve_mask(False if decay is None else mask, params)
        lr = _hyperparameters.at("learning_rate", learning_rate, state.count)
        wd = 0.0 if decay is None else decay(lr, state.count)
        arguments = updates, state, params, lr, wd, constants, fmt, rounding, decays
        # Without jit: one compiled call for the tree. It takes all that it is given to one place,
        # so it is not given leaves without a gradient, which may belong elsewhere.
        treedef = jax.tree.structure(updates)
        trains_all = treedef == jax.tree.structure(state.mu)
        compiles = treedef.num_leaves <= _MOST_LEAVES or not fmt.is_noisy
        if trains_all and compiles and _places.lie_together((updates, state, params)):
            return _update_in_one_call(*arguments)
        return _update(*arguments)

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(state: Any, fmt: _formats.Format) -> AdamaxState:
    """The state; refuses what is none, or one without what belongs to no leaf."""
    if not isinstance(state, AdamaxState):
        hint = "that of optax.adamaxw is converted by adamaxw.moments.convert"
        if isinstance(state, (dict, list)):
            hint = "restore a checkpoint into jax.eval_shape(opt.init, params)"
        raise TypeError(
            f"state must be the AdamaxState that init returned, got a {type(state).__name__}; "
            + hint
        )
    if type(state.count) is int:  # as optax.tree.set may leave it
        state = state._replace(count=jnp.asarray(state.count, jnp.int32))
    expected = {
        "count": ("int32 of shape ()", (jnp.int32, jnp.int64)),
        "nu_scale": ("a float32 scalar", (jnp.float32,)) if fmt.has_scale else ("None", (None,)),
        "seed": ("uint32 of shape ()", (jnp.uint32, None)),
    }
    for name, (words, dtypes) in expected.items():
        x = getattr(state, name)
        if not any(x is None if dtype is None else _leaves.is_array(x, dtype) for dtype in dtypes):
            convert = ". A state made with another one is converted by adamaxw.moments.convert"
            raise TypeError(
                f"state.{name} must be {words} with moment_dtype={fmt.name}, got "
                f"{_leaves.describe(x)}{convert if name == 'nu_scale' else ''}"
            )
    return state


def _unit(fmt: _formats.Format, eps: Any) -> Any:
    """The scale of a fresh state. It is a unit alone, so that it is not differentiated."""
    eps = jax.lax.stop_gradient(jnp.asarray(eps, jnp.float32))
    return fmt.rescale(eps, eps)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Step:
    """What the leaves share at one step.

    Attributes:
        keys: those of the noise; None if there is none.
        scales: those of the moments as they are stored, and as they will be.
        rate: `lr / (1 - b1^t)`.
        decay: the decay factor, by which parameters shrink.
        constants: the other hyperparameters.
        fmt: how moments are stored.
    """

    keys: _noise.Keys | None
    scales: tuple[jax.Array | None, jax.Array | None]
    rate: jax.Array
    decay: Scalar
    constants: Constants
    fmt: _formats.Format = field(metadata={"static": True})


def _update(
    updates: Any,
    state: AdamaxState,
    params: Any,
    lr: Scalar,
    decay: Scalar,
    constants: Constants,
    fmt: _formats.Format,
    rounding: _rounding.ParamRounding,
    decays: tuple[bool, ...],
) -> tuple[Any, AdamaxState]:
    """One step of a tree, `lr` and `decay` being the numbers of this step.

    `params` are None and `decays` is empty where the parameters are not needed.
    """
    moments = state.mu, state.nu, state.residual
    treedef, leaves = _leaves.side_by_side(updates, moments, params, decays, fmt, rounding)

    # Constants of NumPy would be computed with by NumPy, and its warnings.
    before, scale, seed = jax.tree.map(jnp.asarray, (state.count, state.nu_scale, state.seed))
    count = jnp.minimum(before, 2**31 - 2) + 1  # saturates, does not wrap
    # No state has a count below 0: what came of it would be of the wrong size and sign.
    t = jnp.where(before < 0, jnp.nan, count.astype(jnp.result_type(float)))
    rate = lr / bias_correction(cast(constants.b1, t.dtype), t)
    new_scale = None
    if scale is not None:
        eps = constants.eps
        begun = jnp.where(scale == 0, _unit(fmt, eps), scale)  # a state set to zeros is a fresh one
        shrunk = shrink(cast(constants.b2, jnp.float32), begun)
        new_scale = fmt.rescale(shrunk, jnp.asarray(eps, jnp.float32))

    trained = [leaf for leaf in leaves if leaf.rounding is not None]
    indices, keys = repeat(None), None
    if any(fmt.is_noisy or leaf.rounding.is_noisy for leaf in trained):
        indices = iter(_noise.indices(len(trained)))
        keys = _noise.keys(jnp.uint32(0) if seed is None else seed, before)
    step = _Step(keys, (scale, new_scale), rate, decay, constants, fmt)
    rows = [
        _unchanged(leaf) if leaf.rounding is None else _step_leaf(leaf, step, next(indices))
        for leaf in leaves
    ]
    number = 3 if state.residual is None else 4
    updates, mu, nu, *rest = _leaves.columns(treedef, rows, number)
    residual = rest[0] if rest else None
    return updates, AdamaxState(count, mu, nu, new_scale, residual, seed)


_update_in_one_call = jax.jit(_update, static_argnames=("fmt", "rounding", "decays"))


@jax.jit  # Traced once for all leaves of a shape.
def _step_leaf(
    leaf: _leaves.Leaf, step: _Step, index: jax.Array | None
) -> tuple[Any, Any, Any, Any]:
    """Applies the rule to one leaf; returns `(update, mu, nu, residual)`."""
    fmt, rounding = step.fmt, leaf.rounding
    # The state may be spread further than the rest, which is then computed where it lies.
    g = _places.lie_like(leaf.g, leaf.mu)
    p = None if leaf.p is None else _places.lie_like(leaf.p, leaf.mu)
    noise = other_noise = None
    if fmt.is_noisy or rounding.is_noisy:
        axes = _places.varying_axes(g)
        noise, other_noise = _noise.draw(step.keys, index, g.shape, axes)

    dtype = _formats.arithmetic(g.dtype)
    mu, nu = fmt.step(g, (leaf.mu, leaf.nu), step.scales, noise, step.constants)

    # Of the stored moments: a compiler that takes a loop for each result then shares their work.
    ratio = fmt.ratio(mu, nu, step.scales[1], dtype)
    value = None if p is None else rounding.read(p, leaf.residual, ratio.dtype)
    update = next_step(
        ratio,
        value if leaf.decays else None,
        rate=cast(step.rate, ratio.dtype),
        decay=cast(step.decay, ratio.dtype),
    )
    update, residual = rounding.write(update, value, p, leaf.residual, other_noise, g.dtype)
    return _places.lie_like(update, leaf.g, leaf.p), mu, nu, residual


def _unchanged(leaf: _leaves.Leaf) -> tuple[Any, Any, Any, Any]:
    """What `_step_leaf` would return for a leaf that does not train."""
    update = None if leaf.g is None else jnp.zeros_like(leaf.mu)
    return jax.tree.map(jnp.asarray, (update, leaf.mu, leaf.nu, leaf.residual))
