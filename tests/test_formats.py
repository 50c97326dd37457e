"""How moments are stored in few bits: the grids, their ends, and what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import types_of
from modes import x64
from oracle import octaves
from registry import CONFIGS, FORMATS, HALF_STEP, Rates, run

import adamaxw
from adamaxw import _cpu, _formats, moments
from adamaxw._rule import Constants, DecayRate

_LOG = _formats.Logarithmic()

each_format = pytest.mark.parametrize("moment_dtype", FORMATS)


# The grids.


@pytest.mark.parametrize("eps", [1e-10, 1e-8, 1.0])
def test_norms_are_rounded_to_the_nearest_level(eps):
    """uint8 norms from eps to `eps * 2**42.5` are off by at most 1/12 of an octave."""
    size = np.linspace(0, 42.49, 2**14)
    u = np.float32(eps) * 2.0**size
    _, _, got, *_ = moments.unpack(moments.pack(moments.Moments(0, 0 * u, u), "uint8", eps))
    assert np.max(octaves(got, np.float32(u))) <= HALF_STEP


@pytest.mark.slow
def test_uint8_first_moments_are_right_in_the_mean():
    """Over all noise the mean of a code is m to 1e-5 of the norm, and only neighbours occur."""
    rng = np.random.default_rng(0)
    ratio = rng.uniform(-1.1, 1.1, size=150)
    ratio[::3] *= 10 ** rng.uniform(-9, 0, size=50)
    ratio[:2] = 0.0, 1.1
    u = 10 ** rng.uniform(-7.9, 4.7, size=150)
    m, u = (x.astype(np.float32) for x in (ratio * u, u))
    scale, noise = np.float32(0.93e-8), np.arange(2**16, dtype=np.uint32)

    def counts_of(pair):
        mu, nu = _LOG.encode(*(jnp.full(2**16, x) for x in pair), scale, noise)
        # The codes are small integers: their histogram is exact, a sum in float32 is not.
        return jnp.zeros(256, jnp.int32).at[mu.astype(jnp.int32) + 128].add(1), nu[0]

    counts, nu = jax.jit(lambda m, u: jax.lax.map(counts_of, (m, u)))(m, u)
    codes = np.arange(-128, 128, dtype=np.int8)
    decoded = [_LOG.decode(codes, jnp.full(256, c), scale, jnp.float32)[0] for c in nu]
    means = np.sum(np.asarray(counts) * np.nan_to_num(np.float64(decoded)), axis=1) / 2**16
    assert not np.any(counts[:, 0])  # no -128 among them
    assert np.max(np.abs(means - m) / u) < 1e-5
    assert np.max(np.count_nonzero(counts, axis=1)) <= 2


# The step that is made for CPUs, beside the definition.


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_the_step_for_cpus_is_the_definition(stride):
    """For every pair of codes and gradients of all sizes, both give the same codes.

    A few differ by one, where the two evaluate a value near the boundary differently.
    """
    constants = Constants(DecayRate.of(0.9), DecayRate.of(0.99), 1e-8)
    by_definition, of_cpu = (
        jax.jit(functools.partial(step, constants=constants))
        for step in (
            functools.partial(_formats.Format.step, _LOG),
            functools.partial(_cpu.logarithmic_step, _LOG),
        )
    )
    mu, nu = np.meshgrid(np.arange(-128, 128, dtype=np.int8)[::stride], np.arange(256, dtype="u1"))
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 2**16, size=mu.shape, dtype=np.uint32)
    g = 10.0 ** rng.uniform(-12, 8, size=mu.shape) * rng.choice([-1, 0, 1], size=mu.shape)
    for special in (1.0, np.inf, -np.inf, np.nan):
        g = g.astype(np.float32)
        g.flat[::7] = special
        for scale in np.array([0.95e-8, 1.05e-8, 1e-10, 1e-6], np.float32):
            new_scale = _LOG.rescale(0.99 * scale, jnp.float32(1e-8))
            arguments = g, (mu, nu), (scale, new_scale), noise
            expected, got = by_definition(*arguments), of_cpu(*arguments)
            assert types_of(expected) == types_of(got)
            is_bad = np.asarray(expected[0]) == -128
            np.testing.assert_array_equal(is_bad, got[0] == -128)
            # Where m is not finite, the code of the norm has no meaning. Norms above the range, as
            # after eps was lowered, saturate in both; the first moment beside them may differ.
            is_above = nu + 6 * np.log2(0.99 * scale / new_scale) > 255
            for a, b, ignored in zip(expected, got, (is_bad | is_above, is_bad), strict=True):
                off = np.abs(np.asarray(a, int) - np.asarray(b, int))[~ignored]
                assert np.max(off) <= 1
                assert np.mean(off) <= 5e-4


# The ends of everything.


@pytest.mark.parametrize("eps", [1e-10, 1e-8])
def test_gradients_above_the_range(eps):
    """The norm saturates, steps stay bounded by the learning rate, and training recovers.

    Such gradients come first, with alternating signs, and as single spikes.
    """
    top = eps * 2**42.5
    g = np.ones((2000, 96), np.float32)
    g[:100, :32] = np.random.default_rng(0).choice([1e6, -1e6, 1e30, -1e30], size=(100, 32))
    g[:100, 32:64] = np.repeat(np.float32([1e4, 1e6, 1e30, -3e38]), 8)
    g[20, 64:] = np.repeat(np.float32([1e4, 1e6, 1e30, -3e38]), 8)
    updates, _, norms, _ = run("uint8", g, Rates(b2=0.99, eps=eps))
    np.testing.assert_allclose(updates[:100, 32:64], -1e-3 * np.sign(g[:100, 32:64]), rtol=0.14)
    assert np.max(np.abs(updates)) < 1.25e-3 / (1 - 0.9)
    assert np.max(np.abs(updates[:, 32:])) < 1.14e-3
    assert np.max(norms) <= top * 2 ** (1 / 12) * (1 + 1e-5)
    assert np.min(norms[100, :64]) > min(top, 1e4) / 2
    np.testing.assert_allclose(norms[-1], 1.0, rtol=0.06)
    np.testing.assert_allclose(np.mean(updates[-100:], axis=0), -1e-3, rtol=0.07)


@pytest.mark.parametrize("rates", [Rates(b1=0.0, b2=1.0), Rates(eps=1e-10)], ids=str)
@each_format
def test_the_largest_finite_gradients_are_finite(moment_dtype, rates):
    """No intermediate overflows and nothing rounds up to infinity, whatever the scale."""
    g = np.ones((20, 64), np.float32)
    g[:10] = np.resize(np.float32([1e36, 1e38, np.finfo(np.float32).max]), 64)
    *_, state = run(moment_dtype, g[:0], rates)
    for scale in (1.0, 2 - 2.0**-23) if moment_dtype == "bfloat16" else (state.nu_scale,):
        state = state._replace(nu_scale=scale if scale is None else jnp.float32(scale))
        *history, _ = run(moment_dtype, g, rates, state)
        assert all(np.all(np.isfinite(x)) for x in history)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_parameters_under_x64(moment_dtype, dtype):
    """Updates keep the dtype; a gradient beyond float32 does not become NaN in any format."""
    with x64():
        params = jnp.zeros(2, dtype)
        opt = adamaxw.adamax(1e-3, moment_dtype=moment_dtype)
        state, update = opt.init(params), jax.jit(opt.update)
        for g in (1e39 if dtype == "float64" else 1e38, 1.0, 1.0):
            updates, state = update(jnp.array([g, 1.0], dtype), state, params)
            assert updates.dtype == dtype
            assert np.all(np.isfinite(updates))
        assert np.all(np.isfinite(moments.unpack(state).mu))


@pytest.mark.parametrize(("b1", "b2"), [(0.99, 0.9), (0.995, 0.97), (0.9, 0.5)])
def test_the_first_moment_reaches_zero_where_b2_is_below_b1(b1, b2):
    """Once gradients have ended, updates end too, though the norm decays faster than m."""
    g = np.zeros((2000, 64), np.float32)
    g[:100] = np.random.default_rng(0).normal(size=(100, 64)) * 1e-8
    updates, m, _, _ = run("uint8", g, Rates(b1=b1, b2=b2))
    assert not np.any(updates[-100:])
    assert not np.any(m[-1])


# What is refused, and what it is called.


@pytest.mark.parametrize("make", [adamaxw.adamaxw, adamaxw.adamax])
def test_bad_moment_dtype_and_eps_are_refused(make):
    """An unknown moment_dtype, and an eps beyond the range of uint8; its bounds are allowed."""
    for value in (jnp.float32, "int8", 3, float, object(), np.uint8(8), [], ""):
        with pytest.raises(ValueError, match="moment_dtype"):
            make(1e-3, moment_dtype=value)
    for bound, beyond in ((1e-10, 1e-12), (1e25, 1e32)):
        with pytest.raises(ValueError, match="eps"):
            make(1e-3, eps=beyond, moment_dtype="uint8")
        make(1e-3, eps=jnp.float32(bound), moment_dtype="uint8")
        make(1e-3, eps=beyond, moment_dtype="bfloat16")


@pytest.mark.parametrize(("of", "given_to"), [*itertools.permutations(FORMATS, 2)])
def test_a_state_of_another_format_is_refused(of, given_to):
    """The error names the first part that does not fit; a converted state is accepted."""
    params = {"w": jnp.ones(2)}
    state = adamaxw.adamaxw(1e-3, moment_dtype=of).init(params)
    opt = adamaxw.adamaxw(1e-3, moment_dtype=given_to)
    fitting = state._replace(nu_scale=opt.init(params).nu_scale)
    for wrong, name in ((state, r"(mu\['w'\]|nu_scale)"), (fitting, r"mu\['w'\]")):
        with pytest.raises(TypeError, match=rf"state\.{name}"):
            opt.update(params, wrong, params)
    jax.eval_shape(opt.update, params, moments.pack(moments.unpack(state), given_to), params)


@pytest.mark.parametrize("name", FORMATS[1:])
def test_every_spelling_of_a_dtype_is_the_same(name):
    """A scalar type, a NumPy dtype or a string; `inject_hyperparams` needs the string."""
    spellings = (name, jnp.dtype(name), jnp.dtype(name).type, getattr(jnp, name))
    states = [adamaxw.adamax(1e-3, moment_dtype=x).init(jnp.ones(5)) for x in spellings]
    assert [types_of(x) for x in states] == [types_of(states[0])] * 4
    inject = optax.inject_hyperparams(adamaxw.adamaxw)
    assert inject(1e-3, moment_dtype=name).init(jnp.ones(5)).inner_state.nu.dtype == name
    with pytest.raises(ValueError, match=r"moment_dtype.*optax\.inject_hyperparams"):
        inject(1e-3, moment_dtype=getattr(jnp, name)).init(jnp.ones(5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("moment_dtype", "param_rounding"), CONFIGS)
def test_bytes_of_a_state(moment_dtype, param_rounding, dtype):
    """8, 4 or 2 bytes per parameter, 2 more for the residual of a bfloat16 one, and scalars."""
    opt = adamaxw.adamaxw(1e-3, moment_dtype=moment_dtype, param_rounding=param_rounding)
    state = jax.eval_shape(opt.init, jax.ShapeDtypeStruct((30, 40), dtype))
    of_moments = {None: 8, "bfloat16": 4, "uint8": 2}[moment_dtype]
    of_residual = 2 * (param_rounding == "exact" and dtype == "bfloat16")
    is_noisy = moment_dtype is not None or param_rounding == "stochastic"
    of_scalars = 4 + 4 * (moment_dtype is not None) + 4 * is_noisy
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == (
        (of_moments + of_residual) * 1200 + of_scalars
    )
