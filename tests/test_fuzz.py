"""Any values, states, hyperparameters, trees and masks: the recurrence, or NaN that shows."""

import contextlib
import functools
import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modes import x64
from one_step import check_step
from registry import CONFIGS

import adamaxw
from adamaxw import AdamaxState, masks

pytestmark = pytest.mark.usefixtures("compile_fast")

_NUMBERS = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


def _settings(max_examples):
    """`FUZZ=50 pytest tests/test_fuzz.py --hypothesis-seed=1` draws others, 50 times as many."""
    return hypothesis.settings(
        max_examples=max_examples * int(os.environ.get("FUZZ", "1")),
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Values.


@st.composite
def _arrays_of(draw, shape, dtype):
    """An array of integers with any bits, or of floats of one kind or with any bits."""
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "normal", "cauchy", "scales", "zero", "bits", "odd"]))
    x = rng.normal(size=shape)
    if kind == "bits" or dtype.kind in "iu":
        bits = rng.integers(0, 2 ** (8 * dtype.itemsize), size=shape, dtype=np.uint64)
        return np.asarray(bits).astype(f"u{dtype.itemsize}").view(dtype)
    if kind == "cauchy":
        x = rng.standard_cauchy(size=shape)
    elif kind == "scales":
        x = x * 10.0 ** rng.uniform(-50, 50, size=shape)
    elif kind == "zero":
        x = np.where(rng.random(size=shape) < 0.5, 0.0, -0.0)
    elif kind == "odd":
        odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 1e38, -3.4e38, 1e300, 1.0]
        x = rng.choice(odd, size=shape)
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(dtype)


_LEAVES = {
    "nearest": {"w": ("float32", (7,)), "s": ("float16", ())},
    "stochastic": {"w": ("bfloat16", (7,)), "h": ("float16", (7,)), "s": ("float32", ())},
    "exact": {"w": ("bfloat16", (7,)), "s": ("float32", ())},
}


@functools.cache
def _update(moment_dtype, param_rounding):
    """A compiled `update` that takes the hyperparameters too. `s` does not decay."""
    mask = {name: name != "s" for name in _LEAVES[param_rounding]}

    @jax.jit
    def update(gradients, state, params, h):
        kwargs = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
        return adamaxw.adamaxw(**h, mask=mask, **kwargs).update(gradients, state, params)

    return update


@st.composite
def _hyperparameters(draw, moment_dtype):
    fractions = st.floats(2.0**-20, 0.99)
    smallest, largest = (1e-10, 1e25) if moment_dtype == "uint8" else (1e-30, 1e30)
    drawn = {
        "learning_rate": st.sampled_from([1e-3, 1.0, 0.0, 1e-20, 1e20, 3e38]) | fractions,
        "b1": st.sampled_from([0.9, 0.0, 0.5, 0.999, 1 - 2.0**-24]) | fractions,
        "b2": st.sampled_from([0.999, 0.0, 1.0, 0.5, 1e-30, 1 - 2.0**-24]) | fractions,
        "eps": st.sampled_from([1e-8, 1e-8, 1e-3, smallest, largest]),
        "weight_decay": st.sampled_from([0.0, 1e-4, 0.1, 1e20, 3e38]) | fractions,
    }
    return {name: np.float32(draw(values)) for name, values in drawn.items()}


def _any_state(draw, state):
    """The state with other valid contents."""
    mu, nu, residual = (
        jax.tree.map(lambda x: draw(_arrays_of(x.shape, x.dtype)), tree)
        for tree in (state.mu, state.nu, state.residual)
    )
    count, scale = draw(st.integers(0, 2**31 - 1) | st.just(2**31 - 1)), state.nu_scale
    if jax.tree.leaves(nu)[0].dtype == np.uint8:
        scale = np.float32(draw(st.sampled_from([scale, 0.0, 1e-10, 1e-8, 1e-3])))
    else:
        nu = jax.tree.map(np.abs, nu)
        if scale is not None:
            scale = np.float32(draw(st.sampled_from([0.0, 1.0, 1.5, 2 - 2.0**-23])))
    return AdamaxState(np.int32(count), mu, nu, scale, residual, state.seed)


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), CONFIGS)
@_settings(25)
@given(data=st.data())
def test_any_values(data, moment_dtype, param_rounding):
    """Each step agrees with the oracle to the documented roundings, or shows NaN.

    It starts from init or any state; traced hyperparameters may be out of bounds.
    """
    draw = data.draw
    leaves, update = _LEAVES[param_rounding], _update(moment_dtype, param_rounding)
    params = {name: draw(_arrays_of(s, d)) for name, (d, s) in leaves.items()}
    h = draw(_hyperparameters(moment_dtype))
    kwargs = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
    state = adamaxw.adamaxw(1e-3, eps=float(h["eps"]), **kwargs).init(params)
    state = jax.tree.map(np.asarray, state)
    odd = draw(st.sampled_from(["nothing", "state", "hyperparameter"]))
    for i in range(3):
        if i == 1 and odd == "state":
            state = _any_state(draw, state)
        elif i == 1 and odd == "hyperparameter":
            values = [np.nan, np.inf, -np.inf, -0.5, -1e-8, 0.0, 1.0, 2.0, 1e30]
            h[draw(st.sampled_from(list(h)))] = np.float32(draw(st.sampled_from(values)))
        gradients = {
            name: draw(_arrays_of(s, "float16" if d == "float16" else "float32"))
            for name, (d, s) in leaves.items()
        }
        after = jax.tree.map(np.asarray, update(gradients, state, params, h))
        decays = [name != "s" for name in sorted(leaves)]
        may_be_lost = odd != "nothing" and i > 0
        check_step(after, gradients, state, params, h, decays, param_rounding, may_be_lost)
        state = after[1]


# Trees.


_DTYPES = (
    *("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "complex64", "complex128"),
    *("int32", "int8", "uint8", "bool"),
)


class _Pair(NamedTuple):
    """A node of trees."""

    first: Any
    second: Any


@st.composite
def _trees(draw, leaves):
    """Leaves in containers of every kind, some of them empty."""

    def extend(children):
        few = st.lists(children, max_size=3)
        names = st.sampled_from(["w", "b", "a/b", ""])
        dicts = st.dictionaries(names, children, max_size=2)
        return few | few.map(tuple) | st.builds(_Pair, children, children) | dicts

    if draw(st.integers(0, 9)):
        return draw(st.recursive(leaves | st.none(), extend, max_leaves=5))
    leaf = draw(leaves)
    for _ in range(100):
        leaf = [leaf]
    return leaf


@st.composite
def _prefixes(draw, tree):
    """A tree of booleans that is a prefix of another tree."""

    def prefix(node):
        if node is None:
            return None
        if isinstance(node, np.ndarray) or draw(st.integers(0, 3)) == 0:
            return draw(st.booleans())
        return jax.tree.map(prefix, node, is_leaf=lambda x: x is not node)

    return prefix(tree)


@st.composite
def _leaves(draw):
    """A parameter and a gradient for it."""
    shape = draw(st.sampled_from([(3,), (), (0,), (2, 3), (1, 1, 3, 1, 1, 1), (2, 0)]))
    dtype = jnp.dtype(draw(st.sampled_from(_DTYPES)))
    if jnp.issubdtype(dtype, jnp.floating):
        of_gradient = draw(st.sampled_from(["float32", "float16", "bfloat16", "float8_e5m2"]))
        p, g = draw(_arrays_of(shape, dtype)), draw(_arrays_of(shape, of_gradient))
    elif dtype.kind == "c":
        p, g = np.full(shape, 2 - 1j, dtype), np.full(shape, 1 - 2j, dtype)
    else:
        p = np.ones(shape, dtype)
        g = draw(st.sampled_from([np.zeros(shape, jax.dtypes.float0), p]))
    return SimpleNamespace(p=p, g=g)


def _fits(p, moment_dtype, param_rounding):
    """Whether an array can be a parameter."""
    dtype = jnp.dtype(p.dtype)
    if dtype.kind == "c":
        return moment_dtype is None
    fitting = {"stochastic": ("bfloat16", "float16"), "exact": ("bfloat16",)}
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return not is_narrow or dtype.name in fitting.get(param_rounding, [dtype.name])


@pytest.mark.parametrize("mode", [contextlib.nullcontext, x64])
@_settings(10)
@given(data=st.data())
def test_any_tree_any_mask(data, mode):
    """A step of any tree of arrays agrees with the oracle, whatever prefix of it decays.

    Leaves of an unsupported dtype are refused.
    """
    draw = data.draw
    config = draw(st.sampled_from(CONFIGS))
    with mode():
        tree = draw(_trees(_leaves()))
        params, gradients = (jax.tree.map(lambda x, n=n: getattr(x, n), tree) for n in "pg")
        leaves = jax.tree.leaves(params)
        if not leaves:
            return
        mask = draw(_prefixes(params)) if draw(st.booleans()) else None
        static = {"moment_dtype": config[0], "param_rounding": config[1]}
        opt = adamaxw.adamaxw(**_NUMBERS, mask=mask, **static)
        if not all(_fits(p, *config) for p in leaves):
            with pytest.raises(TypeError, match="params"):
                opt.init(params)
            return
        assert len(masks.describe(params, mask).rows) == len(leaves)
        state = opt.init(params)
        after = opt.update(gradients, state, params)
        decays = jax.tree.leaves(jax.tree.broadcast(True if mask is None else mask, params))
        # A wide leaf may be narrower as an array of JAX.
        arrays = jax.tree.map(jnp.asarray, params)
        check_step(after, gradients, state, arrays, _NUMBERS, decays, config[1])
