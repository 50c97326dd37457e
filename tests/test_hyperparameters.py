"""Hyperparameters: every bound, every wrong type, and every trap is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamaxw

_SCALARS = ("learning_rate", "b1", "b2", "eps", "weight_decay")
_ONES = jnp.ones(3)


def _make(name, value, make=adamaxw.adamaxw):
    return make(**{"learning_rate": 1e-3, name: value})


def _update(opt, params=_ONES):
    return opt.update(params, opt.init(params), params)[0]


_BAD = {
    "learning_rate": [-1e-3, 1e39],  # inf in float32
    "b1": [-0.1, 1.0, 1 - 1e-9],  # 1 in float32
    "b2": [-1.0, 1.1],
    "eps": [0.0, -1.0, 1e-31],
    "weight_decay": [-1.0],
}
_GOOD = {
    "learning_rate": [0, np.float32(1e-3)],
    "b1": [0],
    "b2": [0, np.int64(1), jnp.asarray(1)],
    "eps": [1e-30],
    "weight_decay": [0, jnp.asarray(0.1)],
}


@pytest.mark.parametrize("name", _SCALARS)
def test_bounds(name):
    """Known values are checked when the optimizer is made, also in a traced function.

    Integers, NumPy scalars and arrays of shape () are numbers, and the ends of bounds are allowed.
    """
    for value in (*_BAD[name], np.nan, np.inf):
        for make in (adamaxw.adamaxw, adamaxw.adamax)[: 1 if name == "weight_decay" else 2]:
            for carrier in (float, np.float64, np.asarray, jnp.asarray):
                with np.errstate(over="ignore"), pytest.raises(ValueError, match=f"^{name} "):
                    _make(name, carrier(value), make)
        with np.errstate(over="ignore"):
            known = jnp.float32(value)
        with pytest.raises(ValueError, match=f"^{name} "):
            jax.eval_shape(lambda known=known: _make(name, known).init(_ONES))
    for value in _GOOD[name]:
        assert np.all(np.isfinite(_update(_make(name, value))))
        jax.eval_shape(lambda value=value: _make(name, value).init(_ONES))


@pytest.mark.parametrize("name", _SCALARS)
def test_wrong_types(name):
    """What is not a real scalar of at least float32 is refused, traced or not.

    Only rates are schedules: for a callable elsewhere, the error suggests optax.inject_hyperparams.
    """
    for value in (None, "0.1", True, 1j, [0.1], np.bool_(True), jnp.complex64(1)):
        with pytest.raises(TypeError, match=f"^{name} "):
            _make(name, value)
    with pytest.raises(ValueError, match=f"^{name} "):
        _make(name, jnp.full(2, 0.5))
    # 0.999 is 1 in bfloat16, and 1e-8 is 0 in float16.
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        coarse = jnp.asarray(0.5, dtype)
        for value in (coarse, np.asarray(coarse)):
            with pytest.raises(TypeError, match=f"^{name} "):
                _make(name, value)
        with pytest.raises(TypeError, match=f"^{name} "):
            jax.eval_shape(lambda x: _make(name, x).init(jnp.ones(2)), coarse)
    if name not in ("learning_rate", "weight_decay"):
        with pytest.raises(TypeError, match=f"^{name} .*inject_hyperparams"):
            _make(name, lambda count: 0.9)
    for value in (None, 1, "yes"):
        with pytest.raises(TypeError, match=r"^scale_decay_by_lr "):
            _make("scale_decay_by_lr", value)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_what_schedules_return_is_held_to_the_same_rules(name):
    """Where the value is known, which it is not in a compiled step."""
    for error, results in (
        (TypeError, (None, jnp.bfloat16(0.1))),
        (ValueError, (jnp.ones(3), -0.01, np.nan, np.float32(-0.01), jnp.float32(-0.01))),
    ):
        for result in results:
            with pytest.raises(error, match=rf"^{name}\(count\)"):
                _update(_make(name, lambda count, result=result: result))


def test_inject_hyperparams_on_bfloat16_params_is_refused():
    """Without hyperparam_dtype b2 would be 1 (google-deepmind/optax#1414)."""
    params = jnp.ones(4, jnp.bfloat16)
    with pytest.raises(TypeError, match="hyperparam_dtype"):
        optax.inject_hyperparams(adamaxw.adamaxw)(1e-3).init(params)
    opt = optax.inject_hyperparams(adamaxw.adamaxw, hyperparam_dtype=jnp.float32)(1e-3)
    assert opt.init(params).hyperparams["b2"] == np.float32(0.999)
