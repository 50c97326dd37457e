"""The recurrence on one array, against float64 and against its own properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import KINDS, gradients
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import Oracle

from adamaxw._rule import Constants, Decay, bias_correction, next_moments, next_step

_TINY = float(np.finfo(np.float32).tiny)
# XLA flushes denormals to zero, so the rule is compared on normal numbers and zero.
_FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
_VECTORS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=1), elements=_FINITE)
_B1 = st.floats(0, 0.999)
_B2 = st.floats(0, 1)


def _step(g, m, u, p, t=1, *, lr=1e-3, wd=0.1, b1=0.9, b2=0.999, eps=1e-8):
    g, m, u, p = map(jnp.asarray, (g, m, u, p))
    rate = (lr / bias_correction(Decay.of(b1), jnp.float32(t))).astype(m.dtype)
    m, u = next_moments(g, m, u, Constants(Decay.of(b1), Decay.of(b2), eps))
    return next_step(m / u.astype(m.dtype), p, rate=rate, decay=lr * wd), m, u


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64_over_thousands_of_steps(kind):
    """Moments stay within a few roundings of the exact ones, without ever being corrected."""
    steps, shape = 10_000, (32,)
    g = gradients(kind, steps, shape)
    oracle = Oracle(np.ones(shape, np.float32), lr=1e-3, wd=0.1)

    def step(carry, g):
        p, m, u, t = carry
        update, m, u = _step(g, m, u, p, t)
        p += update
        return (p, m, u, t + 1), (update, m, u)

    zeros = jnp.zeros(shape)
    _, got = jax.lax.scan(step, (jnp.ones(shape), zeros, zeros, jnp.float32(1)), g)
    update, _, m, u = oracle.run(g)
    # An infinity norm takes a rounding error of 2**-24 a step, in either direction, until a
    # gradient replaces it: 8 standard deviations over the steps that the longest survives.
    ulp = 2.0**-24
    np.testing.assert_allclose(got[2], u, rtol=8 * ulp * np.sqrt(3000))
    # Sums cancel: their error is measured by the largest terms, which the norm bounds.
    assert np.max(np.abs(got[1] - m) / u) < 8 * ulp
    assert np.max(np.abs(got[0] - update)) < 1e-3 * 300 * ulp


@pytest.mark.parametrize("b1", [0.0, 1e-3, 0.49, 0.5, 0.9, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("traced", [False, True])
def test_bias_correction_keeps_every_digit(b1, traced):
    """1 - b1^t to float32 accuracy from the first step to the ceiling of the count."""
    t = np.array([1, 2, 3, 10, 1000, 10**6, 2**31 - 1], np.float32)
    given_b1 = jnp.float32(b1) if traced else b1
    # A traced b1 is a float32 number, and the correction is the one that belongs to it.
    exact = -np.expm1(t.astype(np.float64) * np.log1p(float(given_b1) - 1.0)) if b1 else 1.0
    got = np.array([bias_correction(Decay.of(given_b1), jnp.float32(x)) for x in t])
    np.testing.assert_allclose(got, np.broadcast_to(exact, t.shape), rtol=3e-7)


@given(g=_VECTORS, b1=_B1, b2=_B2)
def test_first_step_is_the_learning_rate_times_the_sign(g, b1, b2):
    """At t=1 without decay each element moves by lr |g|/(|g| + eps), against its gradient."""
    zeros = np.zeros_like(g)
    update, _, u = _step(g, zeros, zeros, zeros, lr=0.5, b1=b1, b2=b2)
    expected = -0.5 * g.astype(np.float64) / (np.abs(g.astype(np.float64)) + 1e-8)
    # (1 - b1) g is flushed to zero where it is denormal: up to tiny / (1 - b1) / eps is lost.
    np.testing.assert_allclose(update, expected, rtol=1e-6, atol=0.5 * _TINY / 1e-3 / 1e-8)
    np.testing.assert_array_equal(u, np.abs(g) + np.float32(1e-8))


@given(g=_VECTORS, b1=_B1, b2=_B2, seed=st.integers(0, 2**32 - 1))
def test_norm_bounds_gradient_and_never_rises_without_cause(g, b1, b2, seed):
    """|g| + eps <= u_t, and u_t exceeds neither that nor u_{t-1}."""
    u = np.abs(np.random.default_rng(seed).normal(size=g.shape)).astype(np.float32)
    _, _, new = _step(g, g, u, g, b1=b1, b2=b2)
    floor = np.abs(g) + np.float32(1e-8)
    assert np.all(new >= floor)
    assert np.all(new <= np.maximum(u, floor))


@given(
    b1=_B1,
    b2=st.one_of(_B2, st.floats(1e-6, 1e-2), st.sampled_from([0.5, 0.999, 0.9999])),
    seed=st.integers(0, 2**32 - 1),
)
def test_one_step_from_any_state_agrees_with_float64(b1, b2, seed):
    """Each moment to a few roundings, where the old one counts and where the gradient does."""
    rng = np.random.default_rng(seed)
    g, m, p = rng.normal(size=(3, 8)).astype(np.float32)
    g[::2] = 0
    u = np.abs(rng.normal(size=8)).astype(np.float32)
    oracle = Oracle(p, lr=1e-3, b1=b1, b2=b2, wd=0.1)
    oracle.m, oracle.u, oracle.t = m.astype(np.float64), u.astype(np.float64), 4
    exact = oracle.step(g)
    update, new_m, new_u = _step(g, m, u, p, t=5, b1=b1, b2=b2)
    np.testing.assert_allclose(new_u, oracle.u, rtol=3e-7)
    np.testing.assert_allclose(new_m, oracle.m, rtol=3e-7, atol=3e-7 * np.max(np.abs(g)))
    np.testing.assert_allclose(update, exact, rtol=2e-6, atol=1e-9 + 2e-9 * np.max(1 / oracle.u))


@given(g=_VECTORS, b1=_B1, b2=_B2)
def test_opposite_gradients_give_opposite_steps(g, b1, b2):
    """Negating gradient, first moment and parameter negates the update, bit for bit."""
    u = np.abs(g)
    update, m, new_u = _step(g, g, u, g, t=3, b1=b1, b2=b2)
    negated, negated_m, negated_u = _step(-g, -g, u, -g, t=3, b1=b1, b2=b2)
    np.testing.assert_array_equal(negated, -update)
    np.testing.assert_array_equal(negated_m, -m)
    np.testing.assert_array_equal(negated_u, new_u)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-40, 40))
def test_step_does_not_depend_on_the_scale_of_the_gradients(seed, exponent):
    """Gradients and eps times a power of two: the same steps, bit for bit."""
    g = np.random.default_rng(seed).normal(size=(20, 8)).astype(np.float32)

    def run(factor):
        m = u = p = jnp.zeros(8)
        updates = []
        for t, g_t in enumerate(g, 1):
            update, m, u = _step(g_t * factor, m, u, p, t, eps=2.0**-30 * float(factor))
            updates.append(update)
        return np.stack(updates)

    np.testing.assert_array_equal(run(np.float32(2.0**exponent)), run(np.float32(1)))


@pytest.mark.parametrize("eps", [1e-8, 1e-30])
@pytest.mark.parametrize("b1", [0.0, 0.9, 1 - 1e-6])
def test_no_gradient_is_no_step(b1, eps):
    """Zero gradients from the start: the update is zero, for the smallest eps that is allowed."""
    zeros = np.zeros(3, np.float32)
    m, u = zeros, zeros
    for t in range(1, 100):
        update, m, u = _step(zeros, m, u, zeros, t, b1=b1, eps=eps)
        np.testing.assert_array_equal(update, zeros)
    np.testing.assert_array_equal(u, np.full(3, eps, np.float32))


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, float(np.finfo(np.float32).max)])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_extreme_gradients_give_finite_steps(magnitude, dtype):
    """No intermediate over- or underflows: a constant gradient moves by lr."""
    # The modulus of a complex number must be representable too.
    g = np.full(2, magnitude * (1 if dtype == np.float32 else 0.6 + 0.7j), dtype)
    m, u, p = np.zeros(2, dtype), np.zeros(2, np.float32), np.zeros(2, dtype)
    for t in range(1, 50):
        update, m, u = _step(g, m, u, p, t, lr=1.0, eps=1e-30)
        expected = -g.astype(complex) / (np.abs(g.astype(complex)) + 1e-30)
        np.testing.assert_allclose(np.asarray(update), expected, rtol=2e-6)


def test_a_gradient_that_ends_is_forgotten():
    """Moments do not get stuck where (1 - b) x is denormal: beside the smallest eps it is zero."""
    m, u, p = np.zeros(4, np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32)
    g = np.array([1e-30, 1e-20, 1.0, 1e30], np.float32)
    update, m, u = _step(g, m, u, p, lr=1.0, b2=0.9, eps=1e-30)
    for t in range(2, 3000):
        update, m, u = _step(p, m, u, p, t, lr=1.0, b2=0.9, eps=1e-30)
    assert np.max(np.abs(update)) < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_element_is_seen_and_harms_no_other(bad):
    """NaN and inf reach the update of their own element, and of it alone."""
    g = np.ones(5, np.float32)
    spoiled = g.copy()
    spoiled[2] = bad
    zeros = np.zeros(5, np.float32)
    clean = _step(g, zeros, zeros, g)
    dirty = _step(spoiled, zeros, zeros, g)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(np.delete(b, 2), np.delete(a, 2))
    assert np.isnan(dirty[0][2])
    again = _step(g, *dirty[1:], g, t=2)
    assert np.isnan(again[0][2])
