"""Any arguments, trees and leaves: the right types and numbers, or a clear error."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modes import x64
from strategies import (
    REFUSED,
    anything,
    attempt,
    dtypes,
    floats_of,
    is_numeric,
    settings,
    spoiled,
    spoiled_states,
    traced,
    trees,
)
from test_fuzz_states import check_step

import adamaxw
from adamaxw import AdamaxState, masks, moments

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    # Of NumPy, where a leaf is a Python number that becomes inf in float32.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]

_FORMATS = (None, "bfloat16", "uint8")
_ROUNDINGS = ("nearest", "stochastic", "exact")
_CONFIGS = [(name, rounding) for name in _FORMATS for rounding in _ROUNDINGS]
_NUMBERS = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
_BOUNDS = {
    "learning_rate": lambda x: 0 <= x < np.inf,
    "b1": lambda x: 0 <= x < 1,
    "b2": lambda x: 0 <= x <= 1,
    "eps": lambda x: np.float32(1e-30) <= x < np.inf,
    "weight_decay": lambda x: 0 <= x < np.inf,
}


def _is_none(x):
    return x is None


def _check_types(after, gradients, state, params, param_rounding):
    """Structure, shapes and dtypes are those that the protocol and the documentation promise."""
    updates, new = after
    assert isinstance(new, AdamaxState)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for old, x in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert (x.shape, x.dtype) == (old.shape, old.dtype)
    gradients, treedef = jax.tree.flatten(gradients, is_leaf=_is_none)
    assert jax.tree.structure(updates, is_leaf=_is_none) == treedef
    rows = zip(
        *(gradients, jax.tree.leaves(updates, is_leaf=_is_none)),
        *map(treedef.flatten_up_to, (params, state.mu)),
        strict=True,
    )
    for g, update, p, mu in rows:
        if g is None:
            assert update is None
            continue
        expected, p_dtype = jnp.result_type(g), jnp.result_type(p)
        if not jnp.issubdtype(p_dtype, jnp.inexact):
            expected = mu.dtype
        elif p_dtype.itemsize < 4 and (
            param_rounding == "exact"
            or (param_rounding == "stochastic" and expected.itemsize < 4 and expected != p_dtype)
        ):
            expected = jnp.float32
        assert (update.shape, update.dtype) == (mu.shape, expected)


def _check_numbers(after, gradients, state, params, h, may_be_lost=False):
    """The step is that of the oracle, with what `adamaxw` was given."""
    lr, wd = (h[name] for name in ("learning_rate", "weight_decay"))
    lr, wd = (float(x(state.count) if callable(x) else x) for x in (lr, wd))
    mask = h.get("mask")
    mask = mask(params) if callable(mask) else mask
    decays = True if mask is None else jax.tree.leaves(jax.tree.broadcast(mask, params))
    numbers = {name: float(h[name]) for name in ("b1", "b2", "eps")}
    numbers |= {"lr": lr, "wd": wd, "scale_decay_by_lr": h.get("scale_decay_by_lr", True)}
    gradients, params = (_as_arrays(tree) for tree in (gradients, params))
    check_step(
        *(gradients, params, state, after),
        *(numbers, decays, h.get("param_rounding", "nearest"), may_be_lost),
    )


def _as_arrays(tree):
    return jax.tree.map(lambda x: np.asarray(jnp.asarray(x)), tree)


# Hyperparameters.


def _schedule(value):
    return lambda _: value


_values = anything.filter(lambda x: not callable(x))
_masks = st.sampled_from(
    [
        *({"w": True, "b": np.True_}, {"w": True}, {"w": 1, "b": 0}, [True, False]),
        *(masks.matrices, masks.matching("w"), masks.matching("nothing"), lambda p: {"b": True}),
        *(lambda _: {"w": False, "b": True}, lambda p: p),
    ]
)
_ARGUMENTS = {
    "learning_rate": _values | _values.map(_schedule),
    "b1": anything,
    "b2": anything,
    "eps": anything,
    "moment_dtype": anything | st.sampled_from(["uint8", "bfloat16", jnp.uint8]),
    "param_rounding": anything | st.sampled_from(_ROUNDINGS),
    "weight_decay": _values | _values.map(_schedule),
    "mask": _values | _values.map(_schedule) | _masks,
    "scale_decay_by_lr": anything,
}


@pytest.mark.parametrize("make", [adamaxw.adamaxw, adamaxw.adamax])
@settings(40)
@given(data=st.data())
def test_any_hyperparameters(data, make):
    """What is accepted lies in its bounds, and the step is that of the oracle."""
    names = list(_ARGUMENTS)[: None if make is adamaxw.adamaxw else 6]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    arguments = {name: data.draw(_ARGUMENTS[name], label=name) for name in chosen}
    opt = attempt(make, **({"learning_rate": 1e-2} | arguments))
    if opt is REFUSED:
        return
    for name in _BOUNDS.keys() & arguments.keys():
        if not callable(arguments[name]):
            assert np.shape(arguments[name]) == ()
            with np.errstate(all="ignore"):
                assert _BOUNDS[name](np.float32(arguments[name]))
            assert arguments[name] >= 0
    params = {"w": jnp.arange(3.0) - 1, "b": jnp.float32(2)}
    gradients = {"w": jnp.array([0.1, -3.0, 0.0]), "b": jnp.float32(1e-4)}
    state = attempt(opt.init, params)
    after = REFUSED if state is REFUSED else attempt(traced, opt.update, gradients, state, params)
    if after is REFUSED:
        return
    h = {"param_rounding": "nearest", "weight_decay": 1e-4} | _DEFAULTS | arguments
    if make is adamaxw.adamax:
        h["weight_decay"] = 0.0
    _check_types(after, gradients, state, params, h["param_rounding"])
    # Other numbers are another program, and compile anew.
    if data.draw(st.integers(0, 9)) == 0:
        after = opt.update(gradients, state, params)
        _check_numbers(after, gradients, state, params, h)


_DEFAULTS = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8}


# Trees.


def _fits(p, moment_dtype, param_rounding):
    """Whether an array can be a parameter."""
    dtype = jnp.dtype(p.dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return True
    if moment_dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
        return False
    if param_rounding == "nearest" or dtype.itemsize >= 4:
        return True
    return (
        dtype.name
        in {"stochastic": ("bfloat16", "float16"), "exact": ("bfloat16",)}[param_rounding]
    )


@st.composite
def _arrays(draw):
    shapes = [(3,), (), (0,), (2, 3), (1, 1, 3, 1, 1, 1), (2, 0)]
    dtype, shape = draw(dtypes), draw(st.sampled_from(shapes))
    if jnp.issubdtype(dtype, jnp.floating):
        return draw(floats_of(shape, dtype))
    if dtype.kind == "c":
        return np.full(shape, 2 - 1j, dtype)
    return np.ones(shape, dtype)


def _gradient(draw, p):
    dtype = jnp.dtype(p.dtype)
    if dtype.kind == "c":
        return np.full(p.shape, 1 - 2j, dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        narrow = ["float32", "float16", "bfloat16", "float8_e5m2"]
        return draw(floats_of(p.shape, draw(st.sampled_from(narrow))))
    return draw(st.sampled_from([np.zeros(p.shape, jax.dtypes.float0), p]))


@pytest.mark.parametrize("mode", [contextlib.nullcontext, x64])
@settings(12)
@given(data=st.data())
def test_any_tree(data, mode):
    """Every tree of arrays trains by the oracle; what is no array is refused with its path."""
    draw = data.draw
    moment_dtype, param_rounding = draw(st.sampled_from(_CONFIGS))
    static = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
    opt = adamaxw.adamaxw(**_NUMBERS, **static)
    with mode():
        params = draw(trees(_arrays() | _arrays() | anything))
        leaves = jax.tree.leaves(params)
        state = attempt(opt.init, params)
        if not all(isinstance(p, np.ndarray | jax.Array) and is_numeric(p) for p in leaves):
            return
        assert (state is not REFUSED) == all(_fits(p, **static) for p in leaves)
        if state is REFUSED or params is None:
            return
        assert jax.tree.structure(state.mu) == jax.tree.structure(params)
        # The same for a leaf that occurs in many places.
        drawn = {id(p): _gradient(draw, p) for p in leaves}
        gradients = jax.tree.map(lambda p: drawn[id(p)], params)
        after = traced(opt.update, gradients, state, params)
        _check_types(after, gradients, state, params, param_rounding)
        # Another tree is another program.
        if draw(st.integers(0, 4)) == 0 and len(leaves) < 100:
            after = opt.update(gradients, state, params)
            _check_types(after, gradients, state, params, param_rounding)
            _check_numbers(after, gradients, state, params, _NUMBERS | static)


# What does not belong together.

_PARAMS = {
    "w": np.linspace(-1, 1, 3).astype(np.float32),
    "h": [np.array([1.0, -2.0], jnp.bfloat16), np.arange(2)],
}


@functools.cache
def _run(moment_dtype, param_rounding):
    """An optimizer, gradients, and the state after one step."""
    opt = adamaxw.adamaxw(**_NUMBERS, moment_dtype=moment_dtype, param_rounding=param_rounding)
    gradients = jax.tree.map(lambda p: (p + 1).astype(p.dtype), _PARAMS)
    _, state = opt.update(gradients, opt.init(_PARAMS), _PARAMS)
    return opt, gradients, jax.tree.map(np.asarray, state)


def _states():
    return [_run(*config)[2] for config in _CONFIGS]


@st.composite
def _misfits(draw):
    """How a run was made, and its gradients, state and params, of which one is spoiled."""
    config = draw(st.sampled_from(_CONFIGS))
    _, gradients, state = _run(*config)
    params = _PARAMS
    which = draw(st.sampled_from(["gradients", "params", "state", "state", "state"]))
    if which == "gradients":
        gradients = draw(spoiled(gradients))
    elif which == "params":
        params = draw(spoiled(params))
    else:
        state = draw(spoiled_states(state, _states()))
    return config, gradients, state, params


@settings(100)
@given(_misfits(), st.integers(0, 4))
def test_what_does_not_belong_together(misfit, dice):
    """Gradients, states and params that are odd do what others do, or are refused by name."""
    config, *trees = misfit
    (opt, _, clean), param_rounding = _run(*config), config[1]
    after = attempt(traced, opt.update, *trees)
    if after is REFUSED:
        assert attempt(opt.update, *trees) is REFUSED
        return
    gradients, state, params = trees
    # A seed that nothing needs stays, and one that was lost is taken for 0.
    clean = clean._replace(seed=None if state.seed is None else np.zeros((), np.uint32))
    _check_types(after, gradients, clean, params, param_rounding)
    # Without a trace NumPy's float64 is not float32, and refused.
    after = attempt(opt.update, *trees) if dice == 0 else REFUSED
    if after is not REFUSED:
        h = _NUMBERS | {"param_rounding": param_rounding}
        _check_numbers(after, gradients, state, params, h, may_be_lost=True)


@settings(60)
@given(_misfits(), st.sampled_from(_CONFIGS), st.data())
def test_what_the_moments_do_not_belong_to(misfit, other, data):
    """States and Moments that are odd are unpacked, packed and converted right, or refused."""
    _, _, state, params = misfit
    like = _run(*other)[2]
    if data.draw(st.booleans()):
        like = data.draw(spoiled_states(like, _states()))
    attempt(moments.master_params, params, state)
    attempt(adamaxw.diagnostics, params, state, params, groups=data.draw(st.booleans()))
    unpacked = attempt(moments.unpack, state)
    if unpacked is not REFUSED:
        packed = attempt(moments.pack, unpacked, other[0])
        if packed is not REFUSED:
            assert (packed.count.shape, packed.count.dtype) == ((), jnp.int32)
            assert jax.tree.structure(packed.mu) == jax.tree.structure(packed.nu)
    for x in (state, unpacked):
        new = REFUSED if x is REFUSED else attempt(moments.convert, x, like)
        if new is not REFUSED:
            assert jax.tree.structure(new) == jax.tree.structure(like)
