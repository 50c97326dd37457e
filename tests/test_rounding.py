"""Rounding of bfloat16 and float16 parameters, and the residuals of "exact"."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, types_of
from jax import lax
from modes import apply_updates
from registry import FORMATS, Case

import adamaxw
from adamaxw import AdamaxState, _bits, moments
from adamaxw._bits import round_to_bfloat16

_NARROW = ("bfloat16", "float16")
_ROUND = {"bfloat16": jax.jit(round_to_bfloat16), "float16": jax.jit(_bits.round_to_float16)}
_NOISES = np.arange(2**16, dtype=np.uint32)

each_dtype = pytest.mark.parametrize("dtype", _NARROW)
slow = pytest.mark.slow


def _bits_of(x):
    """The bits of 16- or 32-bit numbers: comparisons of floats would flush denormals."""
    x = np.asarray(x)
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def _wide(x):
    return np.asarray(x).astype(np.float64)


def _all_finite(dtype):
    x = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
    return x[np.isfinite(x.astype(np.float32))]


# Parameters and their residuals.


def _master(p, residual):
    """The float32 of which a parameter and its residual are the bits."""
    zero = jnp.zeros(p.shape)
    return moments.master_params(p, AdamaxState(np.int32(0), zero, zero, None, residual))


def _split(x):
    bits = _bits.bits_of(x)
    residual = bits.astype(jnp.int16)
    return _bits.upper(bits, residual).astype(jnp.bfloat16), residual


@jax.jit
def _not_restored(bits):
    """How many float32 are not restored, or have a bfloat16 that is not the nearest."""
    x = lax.bitcast_convert_type(bits, jnp.float32)
    p, residual = _split(x)
    back = _bits.join(p, residual)
    # The nearest, or of the two at the same distance the one with the larger magnitude.
    nearest = ((bits + np.uint32(2**15)) >> 16).astype(jnp.uint16)
    is_right = lax.bitcast_convert_type(p, jnp.uint16) == nearest
    is_right &= lax.bitcast_convert_type(back, jnp.uint32) == bits
    return jnp.sum(~jnp.where(jnp.isnan(x), jnp.isnan(p) & jnp.isnan(back), is_right))


@pytest.mark.parametrize("step", [4093, pytest.param(1, marks=slow)])
def test_split_and_join_lose_nothing(step):
    """The nearest bfloat16 and the residual restore every float32, bit for bit."""
    size = min(2**26, 2**32 // step)
    index = jnp.arange(size, dtype=jnp.uint32) * np.uint32(step)
    for start in range(0, 2**32 // step, size):
        assert _not_restored(index + np.uint32(start)) == 0


@pytest.mark.parametrize("residual", [-(2**15), -1, 0, 2**15 - 1])
def test_a_stale_residual_moves_a_parameter_by_half_a_step_at_most(residual):
    """A finite parameter stays finite with any residual, and a zero never becomes NaN."""
    p = _all_finite("bfloat16")
    master = np.asarray(_master(jnp.asarray(p), jnp.full(p.shape, residual, jnp.int16)))
    assert np.all(np.isfinite(master))
    # The step away from zero: that towards zero is as long, or half as long.
    outer = ((_bits_of(p).astype(np.uint32) + 1) << 16).view(np.float32).astype(np.float64)
    outer = np.where(np.isinf(outer), np.sign(outer) * 2.0**128, outer)
    assert np.all(np.abs(_wide(master) - _wide(p)) <= np.abs(outer - _wide(p)) / 2)


def test_exact_where_the_update_has_no_float32():
    """If p' - p needs more than 24 bits, the master weight is the parameter that p + u gives.

    That happens where a parameter nearly vanishes; the error is at most 2^-24 of its old value.
    """
    rng = np.random.default_rng(0)
    old = rng.uniform(1, 2, 2**20) * 2.0 ** rng.integers(-3, 3, 2**20)
    new = rng.normal(size=2**20) * 2.0 ** rng.uniform(-30, -8, 2**20)
    p, residual = _split(jnp.asarray(old, jnp.float32))
    value = _master(p, residual)
    step = jnp.asarray(new - _wide(value), jnp.float32)
    target = np.asarray(value + step)
    # With b1 = 0, b2 = 1 and a norm of 1 the step is -64 g.
    opt = adamaxw.adamax(64.0, 0.0, 1.0, param_rounding="exact")
    state = opt.init(p)._replace(nu=jnp.ones(p.shape), residual=residual)
    updates, state = jax.jit(opt.update)(-step / 64, state, p)
    landed = apply_updates(p, updates)
    master = np.asarray(_master(landed, state.residual))
    missed = np.asarray(landed != _split(jnp.asarray(target))[0])
    np.testing.assert_array_equal(master[~missed], target[~missed])
    assert np.sum(missed) > 100
    np.testing.assert_array_equal(master[missed], _wide(landed)[missed])
    size = np.abs(_wide(p)[missed])
    assert np.all(np.abs(target[missed]) < 2.0**-16 * size)
    assert np.all(np.abs(master - target)[missed] <= 2.0**-24 * size)


# Rounding at random.


def _values_to_round():
    rng = np.random.default_rng(0)
    representable = [0, 1, -1.5, 2**-14, -(2**-24), 3 * 2**-24, 1023 * 2**-24, 65504]
    edges = [65505, 65519.9, -65535, 65536, 1e30, -1e30, 3.4e38, -3.4028235e38]
    tiny = [1e-40, -1e-40, 1e-38, 2**-25, 2**-24 + 2**-40, 2**-14 - 2**-38]
    spread = rng.normal(size=120) * 10.0 ** rng.uniform(-9, 4.5, size=120)
    subnormal_in_float16 = rng.uniform(-(2.0**-14), 2.0**-14, size=120)
    return np.float32([*representable, *edges, *tiny, *spread, *subnormal_in_float16])


@each_dtype
@pytest.mark.parametrize("number", [40, pytest.param(None, marks=slow)])
def test_random_rounding_has_no_bias(dtype, number):
    """Over all noise the result is one of the two neighbours, and its mean is the value itself."""
    grid = np.unique([*_wide(_all_finite(dtype)), -np.inf, np.inf])
    for x in _values_to_round()[:number]:
        got = _wide(_ROUND[dtype](jnp.full(2**16, x), _NOISES))
        low, high = grid[np.searchsorted(grid, x, "right") - 1], grid[np.searchsorted(grid, x)]
        assert np.all((got == low) | (got == high)), x
        if np.isfinite(high - low):
            # Subnormals of float16 are rounded in float32 arithmetic, the others in their bits.
            tolerance = 2.0**-16 * (high - low) if dtype == "float16" else 0.0
            assert abs(np.mean(got) - float(x)) <= tolerance, x


@each_dtype
def test_random_rounding_keeps_what_is_representable(dtype):
    """Finite values of the dtype, NaN and inf do not change; no finite value becomes infinite."""
    x = _all_finite(dtype)
    for noise in (0, 1, 2**15, 2**16 - 2, 2**16 - 1):
        got = _ROUND[dtype](x.astype(np.float32), jnp.full(x.shape, noise, jnp.uint32))
        np.testing.assert_array_equal(_wide(got), _wide(x), err_msg=f"{noise=}")
    nans = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    largest = float(jnp.finfo(dtype).max)
    above = largest * (1 + float(jnp.finfo(dtype).eps) / 8)
    for x, expected in [*((x, x) for x in [*nans, np.inf, -np.inf]), (above, largest)]:
        got = _wide(_ROUND[dtype](jnp.full(2**16, x, jnp.float32), _NOISES))
        np.testing.assert_array_equal(got, float(expected))


@pytest.mark.parametrize(
    ("dtype", "grad_dtype", "size"),
    [
        *((*pair, 1.0) for pair in itertools.product(_NARROW, ["float32", *_NARROW])),
        ("bfloat16", "float16", 1e-6),  # float16 cannot hold these parameters
        ("bfloat16", "float16", 1e7),
    ],
)
def test_stochastic_does_not_lose_small_steps(dtype, grad_dtype, size):
    """A decay far below the spacing adds up to the right mean, with gradients of any dtype."""
    start, g = jnp.full(1024, size, dtype), jnp.zeros(1024, grad_dtype)
    opt = Case(dtype, None, "stochastic").optimizer()

    def step(_, carry):
        updates, state = opt.update(g, carry[1], carry[0])
        return apply_updates(carry[0], updates), state

    trained, _ = jax.jit(lambda carry: lax.fori_loop(0, 2000, step, carry))(
        (start, opt.init(start))
    )
    ratio = _wide(trained) / _wide(start)
    error = np.std(ratio) / np.sqrt(1024)
    assert 0 < error < 2e-3
    assert abs(np.mean(ratio) - 0.9999**2000) < 4 * error


@pytest.mark.parametrize("grad_dtype", ["float32", *_NARROW])
@each_dtype
def test_stochastic_lands_on_a_neighbour(dtype, grad_dtype):
    """The sum p + u is one of the two neighbours of the float32 result, for gradients of any dtype.

    The update has the dtype of the gradient, or is float32 if both dtypes are narrow and differ.
    """
    rng = np.random.default_rng(2)
    magnitude = rng.uniform(0.25, 4, size=2**14) * rng.choice([-1, 1], size=2**14)
    p, g = jnp.asarray(magnitude, dtype), jnp.asarray(rng.normal(size=2**14), grad_dtype)
    opt, wide = Case(dtype, None, "stochastic").optimizer(), p.astype(jnp.float32)
    step, _ = opt.update(g.astype(jnp.float32), opt.init(wide), wide)
    updates, _ = opt.update(g, opt.init(p), p)
    both_narrow = grad_dtype not in ("float32", dtype)
    assert updates.dtype == ("float32" if both_narrow else grad_dtype)
    new = _wide(apply_updates(p, updates))
    low, high = (
        _wide(_ROUND[dtype](wide + step, jnp.full(p.shape, noise, jnp.uint32)))
        for noise in (0, 2**16 - 1)
    )
    assert np.all((new == low) | (new == high))
    assert 0.3 < np.mean(new[low != high] == high[low != high]) < 0.7


# Trees, and what is refused.


def _mixed(narrow="bfloat16"):
    params = {
        "narrow": jnp.linspace(-1.0, 1.0, 6).astype(narrow).reshape(2, 3),
        "wide": jnp.linspace(-1.0, 1.0, 4),
        "steps": jnp.arange(3, dtype=jnp.int32),
    }
    return params, jax.tree.map(jnp.ones_like, params)


@pytest.mark.parametrize("moment_dtype", FORMATS)
def test_only_bfloat16_leaves_have_residuals(moment_dtype):
    """In a mixed tree the other leaves train as with "nearest", bit for bit."""
    params, gradients = _mixed()
    opt, nearest = (Case("", moment_dtype, x).optimizer() for x in ("exact", "nearest"))
    state, without = opt.init(params), nearest.init(params)
    dtypes = {name: x.dtype for name, x in state.residual.items()}
    assert dtypes == {"narrow": "int16", "wide": "int8", "steps": "int8"}
    updates, new = opt.update(gradients, state, params)
    expected, _ = nearest.update(gradients, without, params)
    assert types_of(new) == types_of(state)
    assert updates.pop("narrow").dtype == jnp.float32
    expected.pop("narrow")
    assert_equal(updates, expected)
    # Where no bits are hidden, there are none in the state.
    assert opt.init({"w": params["wide"]}).residual is None
    assert_equal(moments.master_params(params, without), params)


def test_bad_param_rounding_and_params_are_refused():
    """The error names the argument or the path of the leaf."""
    for make in (adamaxw.adamaxw, adamaxw.adamax):
        for bad in ("up", "Exact", 1, None, jnp.bfloat16):
            with pytest.raises(ValueError, match="param_rounding"):
                make(1e-3, param_rounding=bad)
    params, gradients = _mixed()
    for rounding, dtype in (("exact", "float16"), ("stochastic", "float8_e5m2")):
        opt = adamaxw.adamax(1e-3, param_rounding=rounding)
        with pytest.raises(TypeError, match=r"params\['narrow'\]"):
            opt.init(_mixed(dtype)[0])
        with pytest.raises(ValueError, match="params"):
            opt.update(gradients, opt.init(params))


def test_residuals_that_do_not_fit_are_refused():
    """A missing or misshapen residual, one that would be ignored, and params of another dtype."""
    params, gradients = _mixed()
    opt = Case("", None, "exact").optimizer()
    state = opt.init(params)
    odd = {**state.residual, "narrow": jnp.zeros((3, 2), jnp.int16)}
    wide = {**params, "narrow": params["narrow"].astype(jnp.float32)}
    for residual in (None, odd):
        with pytest.raises(TypeError, match=r"state\.residual\['narrow'\]"):
            opt.update(gradients, state._replace(residual=residual), params)
    with pytest.raises(TypeError, match=r"params\['narrow'\]"):
        opt.update(gradients, state, wide)
    for name in ("nearest", "stochastic"):
        with pytest.raises(TypeError, match=r"params\['narrow'\]"):
            Case("", None, name).optimizer().update(gradients, state, params)
    for bad in ({**params, "narrow": params["narrow"][0]}, wide):
        with pytest.raises(ValueError, match=r"params\['narrow'\]"):
            moments.master_params(bad, state)
    with pytest.raises(TypeError, match="AdamaxState"):
        moments.master_params(params, optax.chain(opt).init(params))
