"""The registry that tests share: formats, wrappers, kinds of axes, and one tree of parameters."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from modes import apply_updates

import adamaxw

MOMENTS = (None, "bfloat16", "uint8")
ROUNDINGS = ("nearest", "stochastic", "exact")
PAIRS = list(itertools.product(MOMENTS, ROUNDINGS))
# Between them, every format and every rounding; the other pairs are slow.
_FEW = list(zip(MOMENTS, ROUNDINGS, strict=True))
EVERY_MOMENT_DTYPE = pytest.mark.parametrize("moment_dtype", MOMENTS)
EVERY_FORMAT = pytest.mark.parametrize(
    ("moment_dtype", "param_rounding"),
    [pytest.param(*pair, marks=() if pair in _FEW else pytest.mark.slow) for pair in PAIRS],
)
AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])

# Trees, shapes and dtypes that do not fit are one or the other.
REFUSED = (TypeError, ValueError)

SHAPES = {"w": (8, 6), "b": (4,), "s": (), "odd": (3, 5)}
MATRIX = {"w": True, "b": False, "s": False, "odd": False}
HYPER = {"learning_rate": 1e-2, "weight_decay": 0.3}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def large(tree):
    """A mask that is a function, which chooses what `MATRIX` does."""
    return jax.tree.map(lambda x: x.size > 20, tree)


def _labels(params):
    return jax.tree.map(lambda x: "large" if x else "rest", large(params))


# Each is a function of what makes the optimizer: `adamaxw.adamaxw`, or `optax.adamaxw`.
WRAPPERS = {
    "bare": lambda make: make(**HYPER),
    "mask": lambda make: make(**HYPER, mask=MATRIX),
    "chain": lambda make: optax.chain(optax.clip(0.5), make(**HYPER)),
    "masked": lambda make: optax.masked(make(**HYPER), MATRIX),
    "masked, mask inside": lambda make: optax.masked(
        make(**HYPER, mask=large), {"w": True, "b": False, "s": True, "odd": False}
    ),
    "partition": lambda make: optax.partition(
        {"large": make(**HYPER), "rest": optax.adamw(0.1)}, _labels
    ),
    "partition, one group": lambda make: optax.partition({"all": make(**HYPER)}, "all"),
    "MultiSteps": lambda make: optax.MultiSteps(make(**HYPER), 3).gradient_transformation(),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(**HYPER), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(
        **HYPER
    ),
    "inject_hyperparams, scheduled": lambda make: optax.inject_hyperparams(
        make, static_args=("mask",), hyperparam_dtype=jnp.float32
    )(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10),
        b1=optax.linear_schedule(0.8, 0.95, 10),
        weight_decay=0.3,
        mask=large,
    ),
    "flatten": lambda make: optax.flatten(make(**HYPER)),
    "conditionally_mask": lambda make: optax.conditionally_mask(
        make(**HYPER), lambda step: step % 2 == 0
    ),
    "split_real_and_imaginary": lambda make: optax.contrib.split_real_and_imaginary(make(**HYPER)),
    "reduce_on_plateau": lambda make: optax.chain(
        make(**HYPER), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "freeze": lambda make: optax.chain(
        make(**HYPER), optax.transforms.freeze({"w": False, "b": True, "s": False, "odd": False})
    ),
}


def states_in(tree):
    """Every AdamaxState inside the state of a wrapper."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, adamaxw.AdamaxState))
    return [x for x in leaves if isinstance(x, adamaxw.AdamaxState)]


def run(opt, params, factors, state=None, compiled=True):
    """Params and state after steps whose gradients are full of each factor."""
    update = jax.jit(opt.update) if compiled else opt.update
    state = opt.init(params) if state is None else state
    for factor in factors:
        grads = jax.tree.map(functools.partial(jnp.full_like, fill_value=factor), params)
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
    return params, state
