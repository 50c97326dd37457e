"""The recurrence in float32, at the limits of its numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from registry import Rates, run

import adamaxw


@functools.partial(jax.jit, static_argnames="b1")
def _rate(count, b1, traced_b1=None):
    """`lr / (1 - b1^t)`, where the ratio of the moments and lr are 1."""
    one = jnp.ones(())
    opt = adamaxw.adamax(1.0, b1=b1 if traced_b1 is None else traced_b1, b2=1.0)
    return -opt.update(one, opt.init(one)._replace(count=count, mu=one, nu=one))[0]


@pytest.mark.parametrize("b1", [0.0, 1e-3, 0.49, 0.5, 0.9, 0.999, 1 - 1e-6])
def test_bias_correction_keeps_every_digit(b1):
    """`1 - b1^t` is accurate in float32 from the first step to the largest count."""
    t = np.array([1, 2, 3, 10, 1000, 10**6, 2**31 - 1])
    for traced in (None, jnp.float32(b1)):
        # A traced b1 is a float32 number, and the correction is the one that belongs to it.
        exact = float(b1 if traced is None else traced)
        exact = -np.expm1(t * np.log1p(exact - 1)) if b1 else np.ones(len(t))
        got = [1 / _rate(jnp.int32(x - 1), b1, traced) for x in t]
        np.testing.assert_allclose(got, exact, rtol=4e-7)


@pytest.mark.parametrize("eps", [1e-8, 1e-30])
@pytest.mark.parametrize("b1", [0.0, 0.9, 1 - 1e-6])
def test_no_gradient_is_no_step(b1, eps):
    """Without gradients updates are zero and the norm is eps, even for the smallest eps.

    Moments do not get stuck at denormal values of (1 - b) x after gradients have ended.
    """
    g = np.zeros((2000, 6), np.float32)
    g[0, :4] = 1e-30, 1e-20, 1.0, 1e30
    updates, _, u, _ = run(None, g, Rates(b1=b1, b2=0.9, eps=eps))
    assert not np.any(updates[:, 4:])
    np.testing.assert_array_equal(u[:, 4:], np.float32(eps))
    assert np.max(np.abs(updates[-1])) < 1e-9 or b1 > 0.9


def test_extreme_gradients_give_finite_steps():
    """No intermediate over- or underflows: a constant gradient of any size gives steps of lr."""
    g = np.float32([1e-29, 1e-20, 1e20, np.finfo(np.float32).max])
    updates, *_ = run(None, np.tile(g, (50, 1)), Rates(1.0, eps=1e-30))
    np.testing.assert_allclose(updates, np.tile(-g / (g + np.float32(1e-30)), (50, 1)), rtol=2e-6)
    direction = (0.6 + 0.7j) / abs(0.6 + 0.7j)
    g = (g[1:] * 0.99 * direction).astype(np.complex64)
    opt = adamaxw.adamax(1.0, eps=1e-30)
    state, update = opt.init(jnp.zeros(3, jnp.complex64)), jax.jit(opt.update)
    for _ in range(20):
        updates, state = update(g, state)
    np.testing.assert_allclose(updates, np.full(3, -direction), rtol=2e-6)
