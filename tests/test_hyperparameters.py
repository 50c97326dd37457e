"""Hyperparameters: every bound, every wrong type, every trap is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamaxw

_SCALARS = ("learning_rate", "b1", "b2", "eps", "weight_decay")


def _make(name, value):
    return adamaxw.adamaxw(**{"learning_rate": 1e-3, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("learning_rate", 1e39),  # inf in float32
        ("b1", -0.1),
        ("b1", 1.0),
        ("b1", 1 - 1e-9),  # 1 in float32
        ("b2", -1),
        ("b2", 1.1),
        ("eps", 0.0),
        ("eps", -1.0),
        ("eps", 1e-31),
        ("weight_decay", -1),
        *((name, bad) for name in _SCALARS for bad in (np.nan, np.inf, -np.inf)),
    ],
)
@pytest.mark.parametrize("kind", [float, np.float64, np.asarray, jnp.asarray])
def test_out_of_bounds(name, value, kind):
    """Known values are checked when the optimizer is made, whatever carries them."""
    with np.errstate(over="ignore"):
        value = kind(value)
    with pytest.raises(ValueError, match=rf"^{name} must satisfy .*{name}.*, got "):
        _make(name, value)


@pytest.mark.parametrize("name", _SCALARS)
def test_known_arrays_in_a_traced_function(name):
    """They are known there, too: accepted within bounds, and refused out of them."""
    good, bad = jnp.float32(0.5), jnp.float32(-1)
    jax.eval_shape(lambda: _make(name, good).init(jnp.zeros(2)))
    with pytest.raises(ValueError, match=f"^{name} must satisfy"):
        jax.eval_shape(lambda: _make(name, bad).init(jnp.zeros(2)))


@pytest.mark.parametrize("name", ["learning_rate", "b1", "b2", "eps"])
def test_adamax_checks_the_same(name):
    """They are those of adamaxw, as the arguments are."""
    with pytest.raises(ValueError, match=f"^{name} must satisfy"):
        adamaxw.adamax(**{"learning_rate": 1e-3, name: -1.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0),
        ("learning_rate", np.float32(1e-3)),
        ("b1", 0),
        ("b2", 0),
        ("b2", 1),
        ("b2", np.int64(1)),
        ("b2", jnp.asarray(1)),
        ("eps", 1e-30),
        ("weight_decay", 0),
        ("weight_decay", jnp.asarray(0.1)),
    ],
)
def test_the_ends_of_the_bounds_and_every_carrier_are_accepted(name, value):
    """Integers, NumPy scalars and arrays of shape () are numbers."""
    opt = _make(name, value)
    params = jnp.ones(2)
    updates, _ = opt.update(params, opt.init(params), params)
    assert np.all(np.isfinite(updates))


@pytest.mark.parametrize("name", _SCALARS)
@pytest.mark.parametrize("value", [None, "0.1", True, 1j, [0.1], np.bool_(True), jnp.complex64(1)])
def test_wrong_types(name, value):
    """What is no real number is a TypeError with the name."""
    with pytest.raises(TypeError, match=f"^{name} must be "):
        _make(name, value)


@pytest.mark.parametrize("name", _SCALARS)
def test_arrays_that_are_no_scalars(name):
    """No hyperparameter is broadcast against the parameters."""
    with pytest.raises(ValueError, match=rf"^{name} must have shape \(\), .*\(2,\)"):
        _make(name, jnp.full(2, 0.5))


@pytest.mark.parametrize("name", _SCALARS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("wrap", [jnp.asarray, np.asarray])
def test_dtypes_too_coarse(name, dtype, wrap):
    """Traced or not: 0.999 is 1 in bfloat16, 1e-8 is 0 in float16."""
    coarse = wrap(jnp.asarray(0.5, dtype))
    with pytest.raises(TypeError, match=f"^{name} came as .*hyperparam_dtype"):
        _make(name, coarse)
    with pytest.raises(TypeError, match=f"^{name} came as .*hyperparam_dtype"):
        jax.jit(lambda x: _make(name, x).init(jnp.ones(2)))(coarse)


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
def test_only_rates_are_schedules(name):
    """A callable elsewhere: the error names the way to schedule it."""
    with pytest.raises(TypeError, match=f"^{name} must be .*inject_hyperparams"):
        _make(name, lambda count: 0.9)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "must be"),
        (jnp.ones(3), ValueError, "shape"),
        (jnp.bfloat16(0.1), TypeError, "came as bfloat16"),
    ],
)
def test_schedules_that_return_no_scalar(name, result, error, message):
    """Refused when it is called, by the name of the schedule."""
    opt = _make(name, lambda count: result)
    params = jnp.ones(3)
    with pytest.raises(error, match=rf"^{name}\(count\).*{message}"):
        opt.update(params, opt.init(params), params)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_scale_decay_by_lr_is_a_bool(value):
    """Nothing else, least of all a number that was meant for another argument."""
    with pytest.raises(TypeError, match=r"^scale_decay_by_lr must be a bool"):
        adamaxw.adamaxw(1e-3, scale_decay_by_lr=value)


def test_inject_hyperparams_on_bfloat16_params_is_refused():
    """Without hyperparam_dtype b2 would be 1 (google-deepmind/optax#1414); with it all is well."""
    params = jnp.ones(4, jnp.bfloat16)
    with pytest.raises(TypeError, match="hyperparam_dtype"):
        optax.inject_hyperparams(adamaxw.adamaxw)(1e-3).init(params)
    opt = optax.inject_hyperparams(adamaxw.adamaxw, hyperparam_dtype=jnp.float32)(1e-3)
    state = opt.init(params)
    assert state.hyperparams["b2"] == np.float32(0.999)
    jax.jit(opt.update)(params, state, params)
