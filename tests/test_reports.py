"""Small surprises that users of optimizers have reported, and what should happen instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from modes import apply_updates

import adamaxw
from adamaxw import _optimizer, moments

_ONES = jnp.ones(3)


def _update(opt, state=None, params=_ONES):
    return opt.update(params, opt.init(params) if state is None else state, params)


@pytest.mark.parametrize("rate", [-0.01, np.nan, np.float32(-0.01), jnp.float32(-0.01)])
def test_schedules_are_held_to_the_bounds_of_numbers(rate):
    """Where their value is known, which it is not in a compiled step."""
    opt = adamaxw.adamaxw(lambda count: rate)
    with pytest.raises(ValueError, match=r"learning_rate\(count\) must.*optax\.scale\(-1\.\)"):
        _update(opt)
    with pytest.raises(ValueError, match=r"weight_decay\(count\) must"):
        _update(adamaxw.adamaxw(0.1, weight_decay=lambda count: rate))
    with pytest.raises(ValueError, match=r"optax\.scale\(-1\.\)"):
        adamaxw.adamaxw(rate)


def test_a_schedule_of_constants_is_compiled():
    """Arrays of JAX that were made in a compiled step, or before it."""
    for rate in (jnp.float32(0.1), 0.1):
        opt = adamaxw.adamaxw(lambda count, rate=rate: rate + 0 * jnp.float32(1))
        state = opt.init(_ONES)
        jax.jit(opt.update)(_ONES, state, _ONES)
        jax.jit(lambda g, s, p, rate=rate: adamaxw.adamaxw(rate).update(g, s, p))(
            _ONES, state, _ONES
        )


@pytest.mark.parametrize("moment_dtype", [None, "bfloat16", "uint8"])
def test_a_count_of_python(moment_dtype):
    """As `optax.tree.set` leaves it, eager and compiled."""
    opt = adamaxw.adamaxw(0.1, moment_dtype=moment_dtype)
    _, state = _update(opt)
    state = optax.tree.set(state, count=0)
    for update in (opt.update, jax.jit(opt.update)):
        _, new = update(_ONES, state, _ONES)
        assert new.count == 1
        assert new.count.dtype == jnp.int32


def test_a_state_restored_as_a_dict():
    """The error says how to restore it."""
    opt = adamaxw.adamaxw(0.1)
    with pytest.raises(TypeError, match=r"jax\.eval_shape\(opt\.init, params\)"):
        _update(opt, opt.init(_ONES)._asdict())


def test_complex_parameters_of_few_bits():
    """The error names the wrapper that splits them, which works."""
    p = jnp.ones(3, jnp.complex64)
    opt = adamaxw.adamaxw(0.1, moment_dtype="uint8")
    with pytest.raises(TypeError, match=r"optax\.contrib\.split_real_and_imaginary"):
        opt.init(p)


@pytest.mark.parametrize("read", [moments.unpack, lambda s: adamaxw.diagnostics(_ONES, s, _ONES)])
def test_a_vmapped_state(read):
    """The error says what it wants."""
    opt = adamaxw.adamaxw(0.1, moment_dtype="uint8")
    states = jax.vmap(opt.init)(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"jax\.vmap"):
        read(states)


def test_bfloat16_through_savez(tmp_path):
    """It comes back as bytes without a dtype, and the error says how to view them."""
    opt = adamaxw.adamaxw(0.1, moment_dtype="bfloat16")
    state = opt.init(_ONES)
    np.savez(tmp_path / "state.npz", mu=state.mu, nu=state.nu)
    with np.load(tmp_path / "state.npz") as saved:
        state = state._replace(mu=saved["mu"], nu=saved["nu"])
    with pytest.raises(TypeError, match=r"\.view\(ml_dtypes\.bfloat16\)"):
        _update(opt, state)


def test_moments_cast_to_integers_are_an_error_of_the_state():
    """Not of the gradients, which are what they should be."""
    opt = adamaxw.adamaxw(0.1, moment_dtype="uint8")
    state = opt.init(_ONES)
    state = state._replace(mu=state.mu.astype(jnp.int32), nu=state.nu.astype(jnp.int32))
    with pytest.raises(TypeError, match=r"state\.mu and state\.nu"):
        _update(opt, state)


def test_other_constants_need_no_other_program():
    """Outside jit, a sweep over b1, b2 and eps compiles once."""
    params = jnp.ones(7)
    _update(adamaxw.adamaxw(0.1, moment_dtype="uint8"), params=params)
    size = _optimizer._update_in_one_call._cache_size()
    for i in range(1, 5):
        opt = adamaxw.adamaxw(0.1 * i, 0.8 + 0.02 * i, 0.99 + 0.001 * i, 1e-8 * i, 0.1 * i)
        _update(opt, params=params)
        opt = adamaxw.adamaxw(0.1, 0.8 + 0.02 * i, 0.99, 1e-8 * i, moment_dtype="uint8")
        _update(opt, params=params)
    assert _optimizer._update_in_one_call._cache_size() <= size + 1


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("param_rounding", ["nearest", "stochastic", "exact"])
def test_updates_that_are_scaled_after_rounding_are_seen(param_rounding):
    """`diagnostics` counts those that the parameters do not show."""
    opt = adamaxw.adamaxw(1e-3, weight_decay=0.0, param_rounding=param_rounding)
    scaled = optax.chain(opt, optax.scale(0.1))
    p = jnp.ones(1000, jnp.bfloat16)

    def lost(opt):
        state, params, most = opt.init(p), p, 0.0
        for _ in range(3):
            updates, state = opt.update(jnp.ones_like(p), state, params)
            scalars = adamaxw.diagnostics(updates, state, params)
            params = apply_updates(params, updates)
            most = max(most, float(scalars["lost"]))
        return most

    assert lost(scaled) > 0.99
    assert lost(opt) == (1 if param_rounding == "nearest" else 0)
    assert "lost" not in adamaxw.diagnostics(_ONES, _update(adamaxw.adamaxw(0.1))[1], _ONES)
