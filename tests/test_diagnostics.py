"""Diagnostics: each scalar against NumPy, in every format, jitted, grouped, and inside wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import EVERY_MOMENT_DTYPE
from flax import nnx
from modes import apply_updates

import adamaxw

pytestmark = pytest.mark.usefixtures("compile_fast", "standard_promotion")

_EPS = 1e-4
_CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-6)
_PARAMS = {
    "dense": {"w": jnp.linspace(-2.0, 2.0, 12).reshape(3, 4), "b": jnp.array([0.5])},
    "scale": jnp.array([3.0, 4.0]),
}
# Of 15 elements two have no gradient, and two have one above the range of uint8.
_GRADS = {
    "dense": {
        "w": jnp.array([[0, 1e-4, 1, -2], [1e9, 3, 0.1, 5], [1, -1, 2, -1e10]], jnp.float32),
        "b": jnp.array([0.0]),
    },
    "scale": jnp.array([1e-3, 7.0]),
}
_NAMES = {"update_norm", "param_norm", "update_to_weight", "at_floor"}


def _after(opt, params=_PARAMS, grads=_GRADS, steps=3):
    """The updates, state and params after a few steps with the same gradients."""
    state, update, updates = opt.init(params), jax.jit(opt.update), grads
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
    return updates, state, params


def _norm(tree):
    leaves = [np.asarray(x, np.complex128).ravel() for x in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves))


@EVERY_MOMENT_DTYPE
def test_each_scalar(moment_dtype):
    """Norms as NumPy has them, fractions counted by hand; all are float32 scalars.

    With groups the same for each key at the top of params, beside that of the whole tree.
    """
    updates, state, params = _after(adamaxw.adamaxw(0.1, eps=_EPS, moment_dtype=moment_dtype))

    diagnose = jax.jit(functools.partial(adamaxw.diagnostics, eps=_EPS, groups=True))
    result = diagnose(updates, state, params)
    names = _NAMES | ({"saturated"} if moment_dtype == "uint8" else set())
    assert set(result) == {p + name for p in ("", "dense/", "scale/") for name in names}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in result.values())
    expected = {
        "update_norm": _norm(updates),
        "param_norm": _norm(params),
        "update_to_weight": _norm(updates) / _norm(params),
        "at_floor": 2 / 15,
        "saturated": 2 / 15,
        "scale/at_floor": 0,
        "dense/at_floor": 2 / 13,
        "scale/param_norm": _norm(params["scale"]),
        "dense/update_norm": _norm(updates["dense"]),
    }
    for name in expected.keys() & result.keys():
        _CLOSE(result[name], expected[name])


@EVERY_MOMENT_DTYPE
def test_a_norm_comes_to_the_floor(moment_dtype):
    """When the last gradient is forgotten, and not a step before; before the first step all are."""
    opt = adamaxw.adamaxw(0.1, b2=0.5, eps=_EPS, moment_dtype=moment_dtype)
    params, zeros = jnp.ones(8), jnp.zeros(8)
    state, update, updates = opt.init(params), jax.jit(opt.update), zeros
    at_floor = [adamaxw.diagnostics(updates, state, params, eps=_EPS)["at_floor"]]
    # 142 eps is 1.1 eps after seven halvings, and eps after eight.
    for grads in (jnp.full(8, 141 * _EPS), *[zeros] * 8):
        updates, state = update(grads, state, params)
        at_floor.append(adamaxw.diagnostics(updates, state, params, eps=_EPS)["at_floor"])
    assert at_floor == [1, *[0] * 8, 1]


_UINT8 = adamaxw.adamax(0.1, eps=_EPS, moment_dtype="uint8")
_IS_DENSE = {"dense": True, "scale": False}
_WRAPPED = {
    "MultiSteps": optax.MultiSteps(_UINT8, 1).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(adamaxw.adamaxw)(
        0.1, eps=_EPS, moment_dtype="uint8"
    ),
    "two formats": optax.partition({True: _UINT8, False: adamaxw.adamax(0.1)}, _IS_DENSE),
}


@pytest.mark.parametrize("name", _WRAPPED)
def test_in_wrappers(name):
    """The state is found wherever it lies; several of them make one picture.

    'saturated' is the fraction of all elements that train, where only some can be.
    """
    result = adamaxw.diagnostics(*_after(_WRAPPED[name]), eps=_EPS, groups=True)
    _CLOSE(result["at_floor"], 2 / 15)
    _CLOSE(result["saturated"], 2 / 15)
    _CLOSE(result["dense/saturated"], 2 / 13)


def test_groups():
    """Each key at the top of params is one, also of Flax NNX; a lone array has none.

    `optax.flatten` keeps one vector for all: no fraction of a group is made up from it.
    """
    tree = {"a": {"x": jnp.ones(2)}, "a/b": jnp.zeros(2)}
    opt = adamaxw.adamax(0.1)
    after = _after(opt, tree, tree, steps=1)
    result = adamaxw.diagnostics(*after, groups=True)
    assert set(result) == {p + name for p in ("", "a/", "a/b/") for name in _NAMES}
    _CLOSE(result["a/param_norm"], _norm(after[2]["a"]))
    variables = nnx.State({"a": nnx.Param(jnp.ones(2)), "a/b": nnx.Param(jnp.zeros(2))})
    assert adamaxw.diagnostics(*_after(opt, variables, variables, 1), groups=True) == result
    lone = _after(opt, jnp.ones(2), jnp.ones(2))
    assert set(adamaxw.diagnostics(*lone, groups=True)) == _NAMES
    result = adamaxw.diagnostics(*_after(optax.flatten(opt), tree, tree), groups=True)
    assert result["at_floor"] == 0.5
    assert set(result) == _NAMES | {p + n for p in ("a/", "a/b/") for n in _NAMES - {"at_floor"}}


def test_what_does_not_train_does_not_count():
    """Integers, None and empty leaves; complex numbers count by their modulus."""
    params = {
        "i": jnp.arange(5),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "z": jnp.array([3 + 4j, 0]),
    }
    grads = {**params, "z": jnp.array([1j, 0])}
    updates, state, _ = _after(adamaxw.adamax(0.5), params, grads, steps=1)
    result = adamaxw.diagnostics(updates, state, params, groups=True)
    assert (result["param_norm"], result["at_floor"]) == (5, 0.5)
    _CLOSE(result["update_norm"], 0.5)
    keys = {f"z/{name}" for name in _NAMES} | {f"empty/{name}" for name in _NAMES - {"at_floor"}}
    assert set(result) == _NAMES | keys
    assert result["empty/update_to_weight"] == 0
    assert not any(np.isnan(x) for x in result.values())


def test_zero_parameters():
    """A ratio of 0 without updates and inf with them: never NaN, not even on the way."""
    params, opt = jnp.zeros(3), adamaxw.adamax(0.1)
    state = opt.init(params)
    with jax.debug_nans(True):
        assert adamaxw.diagnostics(params, state, params)["update_to_weight"] == 0
    assert adamaxw.diagnostics(params + 1, state, params)["update_to_weight"] == np.inf


@EVERY_MOMENT_DTYPE
def test_nan_shows(moment_dtype):
    """In the norms; a moment that is not finite counts neither as low nor as saturated."""
    opt = adamaxw.adamax(0.1, moment_dtype=moment_dtype)
    result = adamaxw.diagnostics(*_after(opt, jnp.ones(4), jnp.array([jnp.nan, 1, jnp.inf, 1])))
    assert np.isnan(result["update_norm"])
    assert result["at_floor"] == result.get("saturated", 0) == 0


def test_more_elements_than_an_int32():
    """Leaves of 2^31 elements and more."""
    params = {"w": jax.ShapeDtypeStruct((70_000, 70_000), jnp.bfloat16)}
    opt = adamaxw.adamax(0.1, moment_dtype="uint8")
    state = jax.eval_shape(opt.init, params)
    assert jax.eval_shape(adamaxw.diagnostics, params, state, params)["at_floor"].shape == ()


def test_bad_arguments_are_refused():
    """A state without an AdamaxState, and an eps that the optimizer would refuse."""
    state = adamaxw.adamaxw(0.1).init(_PARAMS)
    for other in (optax.EmptyState(), optax.adamaxw(0.1).init(_PARAMS)):
        with pytest.raises(TypeError, match="state"):
            adamaxw.diagnostics(_PARAMS, other, _PARAMS)
    for eps, error in ((0, ValueError), (jnp.bfloat16(1e-3), TypeError)):
        with pytest.raises(error, match="eps"):
            adamaxw.diagnostics(_PARAMS, state, _PARAMS, eps=eps)
