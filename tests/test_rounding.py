"""How parameters narrower than float32 are rounded: the roundings, their noise, whole trainings."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import types_of
from jax import lax
from modes import apply_updates

import adamaxw
from adamaxw import _noise, _rounding
from adamaxw._formats import round_to_bfloat16

_ROUNDINGS = ("nearest", "stochastic", "exact")
_FORMATS = (None, "bfloat16", "uint8")
_NARROW = ("bfloat16", "float16")
_ROUND = {"bfloat16": round_to_bfloat16, "float16": _rounding.round_to_float16}
_NOISES = np.arange(2**16, dtype=np.uint32)
_NANS = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)


def _bits(x):
    """The bits of 16- or 32-bit numbers: comparisons of floats would flush denormals."""
    x = np.asarray(x)
    return x.view(np.uint16 if x.dtype.itemsize == 2 else np.uint32)


def _wide(x):
    return np.asarray(x).astype(np.float64)


def _all_16_bits(dtype):
    return np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))


def _split(x):
    bits = _rounding.bits_of(x)
    residual = bits.astype(jnp.int16)
    return _rounding.upper(bits, residual).astype(jnp.bfloat16), residual


def test_split_and_join_lose_nothing():
    """Every float32 comes back bit for bit, from the nearest bfloat16 and its residual."""
    block = 2**26

    @jax.jit
    def mistakes(start):
        bits = start + lax.iota(jnp.uint32, block)
        x = lax.bitcast_convert_type(bits, jnp.float32)
        p, residual = _split(x)
        back = lax.bitcast_convert_type(_rounding.join(p, residual), jnp.uint32)
        high = lax.bitcast_convert_type(p, jnp.uint16)
        nearest = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
        # Of the two at the same distance, the one with the larger magnitude.
        is_tie = (bits & np.uint32(0xFFFF)) == 2**15
        nearest = jnp.where(is_tie, (bits >> 16).astype(jnp.uint16) + np.uint16(1), nearest)
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > 0x7F800000
        high_is_nan = (high & np.uint16(0x7FFF)) > 0x7F80
        back_is_nan = (back & np.uint32(0x7FFFFFFF)) > 0x7F800000
        wrong = jnp.where(is_nan, ~(high_is_nan & back_is_nan), (back != bits) | (high != nearest))
        return jnp.sum(wrong, dtype=jnp.uint32)

    assert sum(int(mistakes(jnp.uint32(i * block))) for i in range(2**32 // block)) == 0


@pytest.mark.parametrize("residual", [-(2**15), -1, 0, 2**15 - 1])
def test_a_stale_residual_moves_a_parameter_by_half_a_step_at_most(residual):
    """A finite parameter stays finite whatever lies beside it, and a zero never becomes NaN."""
    p = _all_16_bits("bfloat16")
    p = p[np.isfinite(p.astype(np.float32))]
    master = np.asarray(_rounding.join(jnp.asarray(p), jnp.full(p.shape, residual, jnp.int16)))
    assert np.all(np.isfinite(master))
    # The step away from zero: that towards zero is as long, or half as long.
    outer = ((_bits(p).astype(np.uint32) + 1) << 16).view(np.float32).astype(np.float64)
    outer = np.where(np.isinf(outer), np.sign(outer) * 2.0**128, outer)
    half = np.abs(outer - _wide(p)) / 2
    assert np.all(np.abs(_wide(master) - _wide(p)) <= half)
    zeros = master[_wide(p) == 0]
    assert len(zeros) == 2
    if residual <= 0:
        np.testing.assert_array_equal(_bits(zeros), np.array([0, 2**31], np.uint32))


def _values_to_round():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=120) * 10.0 ** rng.uniform(-9, 4.5, size=120)
    subnormal_in_float16 = rng.uniform(-(2.0**-14), 2.0**-14, size=120)
    representable = np.array([0, 1, -1.5, 2**-14, -(2**-24), 3 * 2**-24, 1023 * 2**-24, 65504])
    edges = np.array([65505, 65519.9, -65535, 65536, 1e30, -1e30, 3.4e38, -3.4028235e38])
    tiny = np.array([1e-40, -1e-40, 1e-38, 2**-25, 2**-24 + 2**-40, 2**-14 - 2**-38])
    return np.concatenate([spread, subnormal_in_float16, representable, edges, tiny]).astype(
        np.float32
    )


def _neighbours(x, dtype):
    """The largest value towards zero and the smallest away from it; the same if x is one."""
    with np.errstate(over="ignore"):
        nearest = np.asarray(x, np.float32).astype(jnp.dtype(dtype))
    if _wide(nearest) == x:
        return [nearest, nearest]
    bits = _bits(nearest)
    other = (bits - 1 if np.abs(_wide(nearest)) > np.abs(x) else bits + 1).astype(np.uint16)
    return sorted([nearest, other.view(nearest.dtype)], key=lambda y: abs(_wide(y)))


@pytest.mark.parametrize("dtype", _NARROW)
def test_random_rounding_has_no_bias(dtype):
    """Over all noise: one of the two neighbours, and the mean is the value that was rounded."""
    round_ = jax.jit(_ROUND[dtype])
    for x in _values_to_round():
        got = _wide(round_(jnp.full(2**16, x), _NOISES))
        low, high = map(_wide, _neighbours(x, dtype))
        assert np.all((got == low) | (got == high)), x
        if np.isfinite(high):
            # Subnormals of float16 are rounded in float32 arithmetic, the others in their bits.
            tolerance = 2.0**-16 * abs(high - low) if dtype == "float16" else 0.0
            assert abs(np.mean(got) - float(x)) <= tolerance, x


@pytest.mark.parametrize("dtype", _NARROW)
def test_random_rounding_keeps_what_is_representable(dtype):
    """Each of the finite values of the dtype is itself, whatever the noise."""
    x = _all_16_bits(dtype)
    x = x[np.isfinite(x.astype(np.float32))]
    for noise in (0, 1, 2**15, 2**16 - 2, 2**16 - 1):
        got = _ROUND[dtype](jnp.asarray(x.astype(np.float32)), jnp.full(x.shape, noise, jnp.uint32))
        np.testing.assert_array_equal(_wide(got), _wide(x), err_msg=f"{noise=}")


@pytest.mark.parametrize("dtype", _NARROW)
def test_random_rounding_keeps_what_is_not_finite(dtype):
    """NaN of any payload stays NaN and inf stays inf of its sign: noise carries over into none."""
    for x in _NANS:
        assert np.all(np.isnan(_wide(_ROUND[dtype](jnp.full(2**16, x), _NOISES))))
    for x in (np.inf, -np.inf):
        got = _ROUND[dtype](jnp.full(2**16, x, jnp.float32), _NOISES)
        np.testing.assert_array_equal(_wide(got), x)


_N = 2**20


def _noise_of(count, leaf, shape):
    """Of any leaf, which may be traced."""
    index = jnp.stack([jnp.uint32(leaf)] * 2)
    return _noise.draw(_noise.keys(jnp.uint32(0), count), index, shape)


def test_the_index_of_a_leaf_is_the_first_of_its_two():
    """On any platform; no other leaf has the second."""
    indices = np.stack(_noise.indices(500))
    np.testing.assert_array_equal(indices[:, 0], np.arange(500))
    assert np.unique(indices).size == 1000


@functools.cache
def _words(count, leaf, shape=(_N,)):
    """The two halves of the noise side by side, as one uint32 an element."""
    high, low = _noise_of(jnp.int32(count), leaf, shape)
    return (np.asarray(high) << 16) | np.asarray(low)


def _halves(count, leaf, shape=(_N,)):
    return [np.asarray(half) for half in _noise_of(jnp.int32(count), leaf, shape)]


def _assert_uniform(samples):
    """16-bit samples fill 256 bins as random ones do: chi-square to 5 standard deviations."""
    found = np.bincount(np.ravel(samples) >> 8, minlength=256)
    expected = np.size(samples) / 256
    chi_square = np.sum((found - expected) ** 2) / expected
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)


def _assert_uncorrelated(a, b):
    r = np.corrcoef(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64))[0, 1]
    assert abs(r) < 5 / np.sqrt(np.size(a))


def _signs(words):
    """32 rows of the bits of words, as 1 and -1."""
    bits = (words[None, :] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
    return bits.astype(np.float32) * 2 - 1


_PLACES = [(0, 0), (1, 0), (0, 1), (12345, 7), (2**31 - 1, 0), (2**31 - 1, 1000)]


@pytest.mark.parametrize(("count", "leaf"), _PLACES)
def test_noise_is_uniform(count, leaf):
    """Both halves lie in [0, 2^16), in their high and in their low bits as often as not."""
    for half in _noise_of(jnp.int32(count), leaf, (_N,)):
        assert half.dtype == jnp.uint32
        samples = np.asarray(half)
        assert samples.max() < 2**16
        _assert_uniform(samples)
        _assert_uniform((samples & 0xFF) << 8)
    signs = _signs(_words(count, leaf))
    assert np.max(np.abs(np.mean(signs, axis=1))) < 5 / np.sqrt(_N)


@pytest.mark.parametrize("half", [0, 1])
def test_noise_is_uncorrelated(half):
    """Along rows and columns, in time, between leaves and between the halves."""
    square = (1024, 1024)
    for count, leaf in [(0, 0), (1, 0), (12345, 3)]:
        here = _halves(count, leaf, square)
        x = here[half]
        _assert_uncorrelated(*here)
        _assert_uncorrelated(x[:, 1:], x[:, :-1])
        _assert_uncorrelated(x[1:], x[:-1])
        _assert_uncorrelated(x, _halves(count + 1, leaf, square)[half])
        _assert_uncorrelated(x, _halves(count, leaf + 1, square)[half])
        _assert_uncorrelated(x, _halves(count + 1, leaf, square)[1 - half])
        flat = x.ravel()
        for lag in range(1, 9):
            _assert_uncorrelated(flat[lag:], flat[:-lag])
        # Whole rows and columns have their mean like anything else: 1024 samples each.
        for axis in (0, 1):
            means = (np.mean(x, axis) - (2**16 - 1) / 2) / (2**16 / np.sqrt(12 * 1024))
            assert np.max(np.abs(means)) < 5
            assert abs(np.var(means) - 1) < 5 * np.sqrt(2 / 1024)


@pytest.mark.parametrize("lag", [0, *(2**k for k in range(20))])
def test_bits_of_the_noise_are_independent(lag):
    """No bit tells about another, of the same element or of one a power of two away."""
    signs = _signs(_words(3, 1))
    there = signs[:, lag:]
    n = there.shape[1]
    r = signs[:, :n] @ there.T / n
    if lag == 0:
        r -= np.eye(32, dtype=r.dtype)
    # 1024 pairs of bits at each of 21 lags.
    assert np.max(np.abs(r)) < 5.5 / np.sqrt(n)


def test_noise_of_no_two_steps_is_the_same_sequence():
    """4096 steps share no more words than chance gives them: none is another one, shifted.

    Were each step the same sequence read from another place, or with its indices XORed, some of the
    8 million pairs of steps would overlap, and each pair would share 4096 words.
    """
    counts = jnp.arange(4096, dtype=jnp.int32)
    high, low = jax.vmap(lambda count: _noise_of(count, 0, (4096,)))(counts)
    words = np.sort(((np.asarray(high) << 16) | np.asarray(low)).ravel())
    repeated = np.sum(words[1:] == words[:-1])
    expected = len(words) ** 2 / 2 / 2**32
    assert abs(repeated - expected) < 6 * np.sqrt(expected)


def test_noise_of_no_two_leaves_is_the_same_sequence():
    """Likewise for 4096 leaves of a tree."""
    draw = jax.jit(lambda leaves: jax.vmap(lambda i: _noise_of(jnp.int32(5), i, (4096,)))(leaves))
    high, low = draw(jnp.arange(4096, dtype=jnp.uint32))
    words = np.sort(((np.asarray(high) << 16) | np.asarray(low)).ravel())
    repeated = np.sum(words[1:] == words[:-1])
    expected = len(words) ** 2 / 2 / 2**32
    assert abs(repeated - expected) < 6 * np.sqrt(expected)


def test_noise_differs_between_steps_and_leaves():
    """No shift and no XOR of the index takes the noise of one place to that of another."""
    index = np.arange(_N)
    for place, other in itertools.combinations(_PLACES, 2):
        a, b = _words(*place), _words(*other)
        for shift in (0, 1, 2, 3, 8, 1024, 2**19):
            # A chance of 2^-32 for each of 2^20 elements.
            assert np.sum(a == np.roll(b, shift)) <= 2
            assert np.sum(a == b[index ^ shift]) <= 2


@pytest.mark.parametrize(("count", "leaf"), _PLACES)
def test_noise_repeats_itself_no_more_than_chance(count, leaf):
    """Of 2^20 words of 32 bits some 128 would be the same by chance; there may be fewer."""
    assert len(np.unique(_words(count, leaf))) > _N - 128 - 6 * np.sqrt(128)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5), (6, 4), (1, 7, 1)])
def test_noise_depends_on_the_row_major_index(shape):
    """Any shape has noise, and it is that of the same elements in a row, however many follow."""
    size = int(np.prod(shape))
    many = _words(9, 2, (100,))
    np.testing.assert_array_equal(_words(9, 2, shape), many[:size].reshape(shape))


def test_noise_under_vmap_and_jit():
    """Counts may be traced, one or many at a time, up to the last."""
    counts = np.array([0, 1, 77, 2**31 - 1], np.int32)
    draw = functools.partial(_noise_of, leaf=3, shape=(4, 5))
    many = jax.vmap(draw)(counts)
    for i, count in enumerate(counts):
        for transform in (lambda f: f, jax.jit):
            alone = transform(draw)(jnp.asarray(count))
            for half in range(2):
                np.testing.assert_array_equal(many[half][i], alone[half])


@pytest.mark.parametrize("start", [0, 10**6, 2**31 - 4096])
def test_noise_in_time_is_as_good_as_in_space(start):
    """One element over 4096 steps: uniform, balanced, without memory."""
    counts = jnp.arange(start, start + 4096, dtype=jnp.uint32).astype(jnp.int32)
    for half in jax.vmap(lambda count: _noise_of(count, 0, (8,)))(counts):
        for element in np.asarray(half).T:
            _assert_uniform(element)
            assert abs(np.mean(element / 2**16) - 0.5) < 5 / np.sqrt(12 * 4096)
            for lag in (1, 2, 3, 4, 8, 64):
                _assert_uncorrelated(element[lag:], element[:-lag])


_STEPS, _SIZE = 3000, 1024


@functools.cache
def _problem(steps=_STEPS):
    """Gradients, and parameters of which half are so near zero that they cross it often."""
    rng = np.random.default_rng(1)
    p = rng.normal(size=_SIZE) * np.where(np.arange(_SIZE) % 2, 1.0, 1e-3)
    p[:4] = 0.0, -0.0, 1e-20, -1e-20
    gradients = rng.normal(size=(steps, _SIZE))
    return jnp.asarray(p, jnp.bfloat16), gradients.astype(np.float32)


def _train(opt, params, gradients):
    """The parameters after each step, the last ones and their state; compiled as a whole."""

    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        params = apply_updates(params, updates)
        # XLA would convert all of a history in bfloat16 at each step.
        return (params, state), lax.bitcast_convert_type(params, f"uint{8 * params.itemsize}")

    (params, state), history = jax.jit(lambda *args: lax.scan(step, *args))(
        (params, opt.init(params)), gradients
    )
    return np.asarray(history).view(params.dtype), params, state


def _assert_same_training(history, wide_history):
    # Rounded by split, which leaves no choice of its own to the backend.
    expected, _ = _split(jnp.asarray(wide_history))
    np.testing.assert_array_equal(_bits(history), _bits(expected))
    signs = np.sign(np.asarray(wide_history))
    assert np.sum(signs[1:] * signs[:-1] < 0) > 400


@pytest.mark.parametrize(
    ("moment_dtype", "grad_dtype", "learning_rate"),
    [
        *itertools.product(_FORMATS, ["float32", "bfloat16"], [1e-3]),
        (None, "float32", lambda count: 1e-2 / (1 + 0.01 * count.astype(jnp.float32))),
    ],
)
def test_exact_trains_as_float32_does(moment_dtype, grad_dtype, learning_rate):
    """At every step the parameters are those of a float32 training, rounded; so for ever."""
    opt = adamaxw.adamaxw(
        learning_rate, weight_decay=0.1, param_rounding="exact", moment_dtype=moment_dtype
    )
    params, gradients = _problem()
    gradients = jnp.asarray(gradients, grad_dtype)
    history, last, state = _train(opt, params, gradients)
    wide_history, wide, wide_state = _train(
        opt, params.astype(jnp.float32), gradients.astype(jnp.float32)
    )
    assert wide.dtype == jnp.float32
    assert last.dtype == jnp.bfloat16
    _assert_same_training(history, wide_history)
    master = adamaxw.moments.master_params(last, state)
    np.testing.assert_array_equal(_bits(master), _bits(wide))
    for name in ("mu", "nu", "count"):
        np.testing.assert_array_equal(
            np.asarray(getattr(state, name)), np.asarray(getattr(wide_state, name))
        )


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_exact_does_not_depend_on_what_is_compiled_with_it(moment_dtype):
    """The updates compiled alone, and applied outside, give the float32 training as well."""
    opt = adamaxw.adamaxw(1e-3, weight_decay=0.1, param_rounding="exact", moment_dtype=moment_dtype)
    update = jax.jit(opt.update)
    narrow, gradients = _problem()
    wide = narrow.astype(jnp.float32)
    state, wide_state = opt.init(narrow), opt.init(wide)
    history, wide_history = [], []
    for g in jnp.asarray(gradients[:100]):
        updates, state = update(g, state, narrow)
        narrow = apply_updates(narrow, updates)
        wide_updates, wide_state = update(g, wide_state, wide)
        wide = apply_updates(wide, wide_updates)
        history.append(np.asarray(narrow))
        wide_history.append(np.asarray(wide))
    _assert_same_training(np.stack(history), np.stack(wide_history))
    np.testing.assert_array_equal(_bits(adamaxw.moments.master_params(narrow, state)), _bits(wide))


def _decayed(param_rounding, param_dtype, grad_dtype):
    """Parameters after 2000 steps of a decay by 1e-4, from 1, without gradient."""
    opt = adamaxw.adamaxw(1e-3, weight_decay=0.1, param_rounding=param_rounding)
    gradients = jnp.zeros((2000, _SIZE), grad_dtype)
    return _wide(_train(opt, jnp.ones(_SIZE, param_dtype), gradients)[1])


@pytest.mark.parametrize("grad_dtype", ["float32", *_NARROW])
@pytest.mark.parametrize("param_dtype", _NARROW)
def test_stochastic_does_not_lose_small_steps(param_dtype, grad_dtype):
    """Steps far below the spacing of the dtype add up, in the mean, to what they should."""
    p = _decayed("stochastic", param_dtype, grad_dtype)
    error = np.std(p) / np.sqrt(_SIZE)
    assert 0 < error < 1e-3
    assert abs(np.mean(p) - 0.9999**2000) < 4 * error


@pytest.mark.parametrize("param_dtype", _NARROW)
def test_nearest_loses_small_steps(param_dtype):
    """The same decay, rounded to the nearest, never begins: what the others are there for."""
    np.testing.assert_array_equal(_decayed("nearest", param_dtype, "float32"), 1.0)


@pytest.mark.parametrize(
    ("param_rounding", "param_dtype"),
    [("stochastic", "bfloat16"), ("stochastic", "float16"), ("exact", "bfloat16")],
)
def test_no_step_changes_no_bit(param_rounding, param_dtype):
    """Zero gradients without decay leave every finite parameter alone, for all noise there is."""
    opt = adamaxw.adamaxw(0.1, weight_decay=0.0, param_rounding=param_rounding)
    p = _all_16_bits(param_dtype)
    # Denormals of bfloat16 are flushed in any arithmetic, and -0 + 0 is 0.
    keep = np.abs(p.astype(np.float32)) >= np.finfo(np.float32).tiny
    p = p[keep & np.isfinite(p.astype(np.float32))]
    history, last, _ = _train(opt, jnp.asarray(p), jnp.zeros((100, len(p)), param_dtype))
    assert history.dtype == param_dtype
    np.testing.assert_array_equal(_bits(last), _bits(p))


@pytest.mark.parametrize("grad_dtype", ["float32", *_NARROW])
@pytest.mark.parametrize("param_dtype", _NARROW)
def test_stochastic_lands_on_a_neighbour(param_dtype, grad_dtype):
    """The update has the gradient's dtype, and p + u is next to the step that float32 takes.

    From the other dtype of 16 bits, which has not all differences, the update is float32.
    """
    both_narrow = grad_dtype != "float32" and grad_dtype != param_dtype
    rng = np.random.default_rng(2)
    size = 2**14
    magnitude = rng.uniform(0.25, 4, size=size) * rng.choice([-1, 1], size=size)
    p = jnp.asarray(magnitude, param_dtype)
    g = jnp.asarray(rng.normal(size=size), grad_dtype)
    opt = adamaxw.adamaxw(1e-2, weight_decay=0.1, param_rounding="stochastic")
    state, wide_state = opt.init(p), opt.init(p.astype(jnp.float32))
    up = down = 0
    for _ in range(5):
        wide = p.astype(jnp.float32)
        step, wide_state = opt.update(g.astype(jnp.float32), wide_state, wide)
        # Both are computed operation by operation, so that the targets are the same to the bit.
        updates, state = opt.update(g, state, p)
        assert updates.dtype == ("float32" if both_narrow else grad_dtype)
        p = apply_updates(p, updates)
        assert p.dtype == param_dtype
        low = _wide(_ROUND[param_dtype](wide + step, jnp.zeros(size, jnp.uint32)))
        high = _wide(_ROUND[param_dtype](wide + step, jnp.full(size, 2**16 - 1, jnp.uint32)))
        down += np.sum(_wide(p) == low)
        up += np.sum((_wide(p) == high) & (low != high))
        assert np.all((_wide(p) == low) | (_wide(p) == high))
    assert min(up, down) > 0.3 * 5 * size


def _mixed(narrow="bfloat16"):
    params = {
        "narrow": jnp.linspace(-1.0, 1.0, 6).astype(narrow).reshape(2, 3),
        "wide": jnp.linspace(-1.0, 1.0, 4),
        "steps": jnp.arange(3, dtype=jnp.int32),
    }
    return params, jax.tree.map(lambda p: jnp.ones_like(p), params)


@pytest.mark.parametrize("param_rounding", ["stochastic", "exact"])
@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_float32_parameters_are_not_touched(moment_dtype, param_rounding):
    """Their updates and moments are those of "nearest" to the bit, with no residual."""
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32), "b": jnp.ones(3)}

    def run(param_rounding):
        opt = adamaxw.adamaxw(
            1e-2, weight_decay=0.1, moment_dtype=moment_dtype, param_rounding=param_rounding
        )
        state, p, history = opt.init(params), params, []
        for _ in range(5):
            updates, state = opt.update(jax.tree.map(jnp.sin, p), state, p)
            p = optax.apply_updates(p, updates)
            history.append(updates)
        return history, state

    history, state = run(param_rounding)
    expected, nearest = run("nearest")
    jax.tree.map(np.testing.assert_array_equal, history, expected)
    jax.tree.map(
        np.testing.assert_array_equal, state._replace(seed=None), nearest._replace(seed=None)
    )
    assert state.residual is None


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_residuals_lie_beside_bfloat16_alone(moment_dtype):
    """A mixed tree: int16 where there is something to keep, and the types of the state stay."""
    params, gradients = _mixed()
    opt = adamaxw.adamaxw(1e-2, param_rounding="exact", moment_dtype=moment_dtype)
    state = opt.init(params)
    assert state.residual["narrow"].dtype == jnp.int16
    assert state.residual["narrow"].shape == (2, 3)
    assert state.residual["wide"].dtype == jnp.int8
    assert state.residual["steps"].dtype == jnp.int8
    updates, new = opt.update(gradients, state, params)
    assert types_of(new) == types_of(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert updates["narrow"].dtype == jnp.float32
    np.testing.assert_array_equal(updates["steps"], 0)
    master = adamaxw.moments.master_params(apply_updates(params, updates), new)
    assert {name: x.dtype for name, x in master.items()} == {
        "narrow": jnp.float32,
        "wide": jnp.float32,
        "steps": jnp.int32,
    }


@pytest.mark.parametrize("make", [adamaxw.adamaxw, adamaxw.adamax])
@pytest.mark.parametrize("bad", ["up", "", "Exact", 1, None, True, jnp.bfloat16])
def test_an_unknown_rounding_is_refused(make, bad):
    """The error names the three that there are."""
    with pytest.raises(ValueError, match='"nearest", "stochastic" or "exact"'):
        make(1e-3, param_rounding=bad)


@pytest.mark.parametrize(
    ("param_rounding", "dtype"),
    [("exact", "float16"), ("stochastic", "float8_e4m3fn"), ("exact", "float8_e4m3fn")],
)
def test_a_rounding_that_a_dtype_does_not_have_is_refused_at_init(param_rounding, dtype):
    """The error names the path and the dtype."""
    opt = adamaxw.adamaxw(1e-3, param_rounding=param_rounding)
    with pytest.raises(TypeError, match=rf"params\['narrow'\] is {dtype}.*{param_rounding}"):
        opt.init(_mixed(dtype)[0])


@pytest.mark.parametrize("make", [adamaxw.adamaxw, adamaxw.adamax])
@pytest.mark.parametrize("param_rounding", ["stochastic", "exact"])
def test_rounding_needs_params(make, param_rounding):
    """Without them there is nothing to round; the error says what asks for them."""
    params, gradients = _mixed()
    opt = make(1e-3, param_rounding=param_rounding)
    state = opt.init(params)
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)") as error:
        opt.update(gradients, state)
    if make is adamaxw.adamax:
        assert f'param_rounding="{param_rounding}"' in str(error.value)


def test_params_that_became_wider_are_refused():
    """As equinox.apply_updates makes them of float32 updates: the residual would go astray."""
    params, gradients = _mixed()
    opt = adamaxw.adamaxw(1e-3, param_rounding="exact")
    wide = {**params, "narrow": params["narrow"].astype(jnp.float32)}
    with pytest.raises(TypeError, match=r"params\['narrow'\].*optax\.apply_updates"):
        opt.update(gradients, opt.init(params), wide)


def test_a_missing_residual_is_refused():
    """A state from elsewhere, without what "exact" keeps, does not pass for one with zeros."""
    params, gradients = _mixed()
    opt = adamaxw.adamaxw(1e-3, param_rounding="exact")
    state = opt.init(params)
    with pytest.raises(TypeError, match=r"state\.residual\['narrow'\] must be int16"):
        opt.update(gradients, state._replace(residual=None), params)
    odd = {**state.residual, "narrow": jnp.zeros((3, 2), jnp.int16)}
    with pytest.raises(TypeError, match=r"state\.residual\['narrow'\] must be int16"):
        opt.update(gradients, state._replace(residual=odd), params)


def test_a_residual_that_nothing_reads_is_refused():
    """A state of "exact" does not go on under another rounding and lose what it has kept."""
    params, gradients = _mixed()
    state = adamaxw.adamaxw(1e-3, param_rounding="exact").init(params)
    for other in ("nearest", "stochastic"):
        opt = adamaxw.adamaxw(1e-3, param_rounding=other)
        with pytest.raises(TypeError, match=r"params\['narrow'\].*residual"):
            opt.update(gradients, state, params)
        opt.update(gradients, state._replace(residual=None), params)


def test_master_params_refuses_what_does_not_fit():
    """It wants an AdamaxState, and the parameters that go with it."""
    params, _ = _mixed()
    opt = adamaxw.adamaxw(1e-3, param_rounding="exact")
    state = opt.init(params)
    chained = optax.chain(optax.clip(1.0), opt).init(params)
    with pytest.raises(TypeError, match="AdamaxState, got a tuple"):
        adamaxw.moments.master_params(params, chained)
    adamaxw.moments.master_params(params, chained[1])
    for bad in (params["narrow"][0], params["narrow"].astype(jnp.float32)):
        with pytest.raises(ValueError, match=r"params\['narrow'\] must be bfloat16 of shape"):
            adamaxw.moments.master_params({**params, "narrow": bad}, state)


def test_master_params_of_a_rounding_that_keeps_nothing_are_params():
    """Where no bits are hidden, it gives back what it is given."""
    params, _ = _mixed()
    for other in ("nearest", "stochastic"):
        state = adamaxw.adamaxw(1e-3, param_rounding=other).init(params)
        jax.tree.map(
            np.testing.assert_array_equal, adamaxw.moments.master_params(params, state), params
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("moment_dtype", _FORMATS)
@pytest.mark.parametrize("param_rounding", _ROUNDINGS)
def test_a_bad_gradient_is_seen_and_harms_no_other(param_rounding, moment_dtype, bad):
    """Its parameter is NaN from then on, and the others are what they would have been."""
    opt = adamaxw.adamaxw(
        1e-2, weight_decay=0.1, param_rounding=param_rounding, moment_dtype=moment_dtype
    )
    update = jax.jit(opt.update)
    start = jnp.linspace(-1.0, 1.0, 9).astype(jnp.bfloat16)
    clean = np.linspace(1.0, 2.0, 9).astype(np.float32)
    spoiled = clean.copy()
    spoiled[3] = bad

    def run(first):
        params, state = start, opt.init(start)
        for g in (first, clean, clean):
            updates, state = update(jnp.asarray(g, jnp.bfloat16), state, params)
            params = apply_updates(params, updates)
        return np.asarray(params)

    got, expected = run(spoiled), run(clean)
    assert np.isnan(_wide(got[3]))
    assert np.all(np.isfinite(_wide(expected)))
    np.testing.assert_array_equal(_bits(np.delete(got, 3)), _bits(np.delete(expected, 3)))


def test_exact_where_the_update_has_no_float32():
    """A parameter that nearly vanishes lands where the sum takes it, and its master with it.

    Then p' - p has more than 24 bits. What is lost is a rounding of the old value, 2^-24 of it.
    """
    rng = np.random.default_rng(0)
    old = rng.uniform(1, 2, 2**20) * 2.0 ** rng.integers(-3, 3, 2**20)
    new = rng.normal(size=2**20) * 2.0 ** rng.uniform(-30, -8, 2**20)
    p, residual = _split(jnp.asarray(old, jnp.float32))
    how = _rounding.Exact()
    value = how.read(p, residual, jnp.float32)
    step = jnp.asarray(new - _wide(value), jnp.float32)
    target = np.asarray(value + step)
    update, residual = how.write(step, value, p, residual, None, jnp.float32)
    landed = apply_updates(p, update)
    master = np.asarray(_rounding.join(landed, residual))
    missed = np.asarray(landed != _split(jnp.asarray(target))[0])
    np.testing.assert_array_equal(master[~missed], target[~missed])
    assert np.sum(missed) > 100
    assert np.all(np.abs(target[missed]) < 2.0**-16 * np.abs(_wide(p)[missed]))
    assert np.all(np.abs(master - target)[missed] <= 2.0**-24 * np.abs(_wide(p)[missed]))


@pytest.mark.parametrize("dtype", _NARROW)
def test_random_rounding_overflows_no_sooner_than_the_nearest(dtype):
    """The largest numbers of a dtype are not taken to inf by chance."""
    largest = float(jnp.finfo(dtype).max)
    above = np.float32(largest * (1 + float(jnp.finfo(dtype).eps) / 8))
    assert np.isfinite(_wide(jnp.asarray(above, dtype)))
    got = _ROUND[dtype](jnp.full(2**16, above), _NOISES)
    np.testing.assert_array_equal(_wide(got), largest)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e7])
def test_stochastic_with_gradients_of_the_other_narrow_dtype(size):
    """bfloat16 parameters that float16 cannot hold decay under float16 gradients all the same."""
    opt = adamaxw.adamaxw(1e-2, weight_decay=1e-2, param_rounding="stochastic")
    start = jnp.full(_SIZE, size, jnp.bfloat16)
    _, last, _ = _train(opt, start, jnp.zeros((1000, _SIZE), jnp.float16))
    ratio = _wide(last) / _wide(start)
    assert abs(np.mean(ratio) - 0.9999**1000) < 5 * np.std(ratio) / np.sqrt(_SIZE)
