"""The moments of a state in plain numbers: `unpack`, `pack` and `master_params` in each format."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MOMENTS as _NAMES
from equality import assert_equal, types_of
from gradients import gradients
from modes import apply_updates, x64
from oracle import octaves

import adamaxw
from adamaxw import moments
from adamaxw.moments import Moments

pytestmark = pytest.mark.usefixtures("compile_fast")

_STEPS = 250
_START = {"w": jnp.linspace(-1, 1, 512).reshape(16, 32), "b": jnp.ones(64)}
# With a drift, so that params move more than their noise.
_GRADIENTS = {
    name: jnp.asarray(0.3 + gradients("normal", _STEPS, p.shape, seed))
    for seed, (name, p) in enumerate(_START.items())
}
# In octaves, half the last bit of a norm; and the step of the grid of mu / nu.
_NORM_BOUNDS = {None: 1e-7, "bfloat16": np.log2(1 + 2.0**-8), "uint8": 1 / 12 + 1e-4}
_GRIDS = {None: 1e-7, "bfloat16": 2.0**-7, "uint8": 2 * 1.25 / 127}

# As compiled functions, and much faster than operation by operation.
_unpack = jax.jit(moments.unpack)
_pack = jax.jit(moments.pack, static_argnums=(1, 2))


@functools.cache
def _training(name, rounding="exact"):
    """An optimizer, and a compiled loop from (params, state) over gradients."""
    opt = adamaxw.adamaxw(1e-3, moment_dtype=name, param_rounding=rounding)

    def step(carry, g):
        updates, state = opt.update(g, carry[1], carry[0])
        return (apply_updates(carry[0], updates), state), None

    return opt, jax.jit(lambda carry, g: jax.lax.scan(step, carry, g)[0])


def _start(rounding="exact"):
    """In bfloat16, or the same values in float32."""
    half = optax.tree.cast(_START, jnp.bfloat16)
    return half if rounding == "exact" else optax.tree.cast(half, jnp.float32)


@functools.cache
def _trained(name, steps, rounding="exact"):
    (opt, loop), params = _training(name, rounding), _start(rounding)
    return loop((params, opt.init(params)), jax.tree.map(lambda g: g[:steps], _GRADIENTS))


def _flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("functions", [(moments.unpack, moments.pack), (_unpack, _pack)])
@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("name", _NAMES)
def test_pack_is_the_inverse_of_unpack(name, steps, functions):
    """In its own format a state comes back bit for bit, but for one rounding of bfloat16 norms."""
    unpack, pack = functions
    state = _trained(name, 50)[1] if steps else _training(name)[0].init(_start())
    values = unpack(state)
    assert steps or not np.any(_flat(values.mu))
    assert steps or np.all(_flat(values.nu) <= 1e-8 * (1 + 1e-5))
    back = pack(values, name, 1e-8)
    assert types_of(back) == types_of(state)
    if name == "uint8":
        # Norms between whole octaves are powers of two to 4e-6, and so is the largest over eps.
        np.testing.assert_allclose(back.nu_scale, state.nu_scale, rtol=8e-6)
    norms = (_flat(_unpack(s).nu) for s in (back, state))
    np.testing.assert_allclose(*norms, rtol=2.0**-8)
    same = {"nu_scale": None} | ({"nu": None} if name == "bfloat16" else {})
    assert_equal(back._replace(**same), state._replace(**same))


def test_uint8_moments_survive_wherever_the_scale_stands():
    """What a packed state decodes to is what was packed: at eps itself, and a whole step below."""
    # All codes of the norm, of which none may fall out of the grid.
    codes = jnp.arange(256, dtype=jnp.uint8), jnp.arange(-127, 129).clip(-127, 127).astype("int8")
    params = jnp.zeros(256)

    def run(b2, eps):
        opt = adamaxw.adamax(1e-3, b2=b2, eps=eps, moment_dtype="uint8")

        def step(state, _):
            _, new = opt.update(params, state)
            values = moments.unpack(new)
            back = moments.unpack(moments.pack(values, "uint8", eps))
            return new, [(values.mu, back.mu), (values.nu, back.nu)]

        state = opt.init(params)._replace(nu=codes[0], mu=codes[1])
        return jax.lax.scan(step, state, length=200)[1]

    rates = itertools.product([1.0, 0.5, 0.9, 0.999, 0.99999], [1e-10, 1e-8, 1e-3])
    b2, eps = np.array(list(rates), np.float32).T
    for values, back in jax.jit(jax.vmap(run))(b2, eps):
        np.testing.assert_allclose(back, values, rtol=1e-5)


@pytest.mark.parametrize("to", _NAMES)
@pytest.mark.parametrize("of", _NAMES)
def test_training_goes_on_in_another_format(of, to):
    """50 steps in one, 200 in the other: the float32 weights are kept, and end as in float32."""
    (params, state), (opt, loop) = _trained(of, 50), _training(to)
    changed = _pack(_unpack(state), to, 1e-8)
    assert types_of(changed) == types_of(opt.init(params))
    assert_equal(changed.residual, state.residual)
    assert_equal(*(moments.master_params(params, s) for s in (state, changed)))
    params, state = loop((params, changed), jax.tree.map(lambda g: g[50:], _GRADIENTS))
    assert state.count == _STEPS
    # The gradients are float32, so that a float32 run from the same start is the same run.
    exact, _ = _trained(None, _STEPS, "nearest")
    difference = _flat(moments.master_params(params, state)) - _flat(exact)
    movement = _flat(exact) - _flat(_start())
    # Norms are off by up to 6% in uint8, 0.4% in bfloat16, differently in each element.
    bound = {None: 1e-5, "bfloat16": 0.005, "uint8": 0.05}
    assert np.sqrt(np.mean(difference**2) / np.mean(movement**2)) <= max(bound[of], bound[to])


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_moments_of_your_own(dtype, name):
    """NumPy arrays in any floating dtype and a Python count, as a conversion may bring them."""
    mu = np.random.default_rng(0).uniform(-1, 1, size=(4, 8)).astype(jnp.dtype(dtype))
    nu = (np.abs(mu.astype(np.float64)) + 0.5).astype(jnp.dtype(dtype))
    state = moments.pack(Moments(7, mu, nu), name)
    like = adamaxw.adamaxw(1e-3, moment_dtype=name).init(jnp.ones((4, 8)))
    assert types_of(state) == types_of(like)
    got = moments.unpack(state)
    assert got.count == 7
    assert np.max(octaves(got.nu, nu.astype(np.float64))) <= _NORM_BOUNDS[name]
    error = np.abs(np.asarray(got.mu, np.float64) - mu.astype(np.float64))
    assert np.max(error / nu.astype(np.float64)) <= max(1e-7, 0.52 * _GRIDS[name])


def test_float64_and_complex_moments():
    """Kept as they are without a format; complex is refused with its path by the narrow ones."""
    with x64():
        dtypes = {"double": jnp.float64, "single": jnp.float32, "z": jnp.complex64}
        params = {name: jnp.ones(2, dtype) for name, dtype in dtypes.items()}
        opt = adamaxw.adamaxw(1e-3)
        _, state = opt.update(params, opt.init(params), params)
        got = moments.unpack(state)
        assert {name: x.dtype for name, x in got.mu.items()} == dtypes
        assert_equal(moments.pack(got), state)
        for name in ("uint8", "bfloat16"):
            with pytest.raises(TypeError, match=r"mu\['z'\].*moment_dtype"):
                moments.pack(got, name)
            narrow = moments.pack(Moments(1, got.mu["double"], got.nu["double"]), name)
            assert narrow.nu.dtype == name
            np.testing.assert_allclose(moments.unpack(narrow).nu, 1.0, rtol=0.06)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("name", _NAMES)
def test_what_is_not_finite_shows_after_packing(name, bad):
    """In mu of that element; the others are none the worse, and the scale is theirs."""
    mu, nu = jnp.full(6, 0.5), jnp.ones(6)
    clean = moments.unpack(_pack(Moments(1, mu, nu), name, 1e-8))
    for spoiled in (Moments(1, mu, nu.at[2].set(bad)), Moments(1, mu.at[2].set(bad), nu)):
        got = moments.unpack(_pack(spoiled, name, 1e-8))
        assert not np.isfinite(got.mu[2])
        for a, b in ((clean.mu, got.mu), (clean.nu, got.nu)):
            np.testing.assert_array_equal(np.delete(a, 2), np.delete(b, 2))


@pytest.mark.parametrize("of", _NAMES)
def test_leaves_that_do_not_train_pass(of):
    """Integer and boolean leaves, None and MaskedNode; int8 and uint8 are no codes here."""
    codes = {name: jnp.ones(2, name) for name in ("int8", "uint8", "bool")}
    params = {"w": jnp.ones(2), "none": None, "masked": optax.MaskedNode(), **codes}
    unpacked = jax.eval_shape(moments.unpack, adamaxw.adamaxw(1e-3, moment_dtype=of).init(params))
    assert types_of(unpacked.mu) == types_of(params)
    for to in _NAMES:
        packed = jax.eval_shape(functools.partial(moments.pack, moment_dtype=to), unpacked)
        assert types_of(packed) == types_of(adamaxw.adamaxw(1e-3, moment_dtype=to).init(params))
        assert moments.unpack(moments.pack(Moments(3, {}, {}), to))[:3] == (3, {}, {})


def test_eps_and_the_largest_norm_set_the_grid_of_uint8():
    """Norms below eps are stored as about eps; far above, as the largest; one grid for all."""
    norms = jnp.array([1e-12, 1e-6, 1.0, 1e9])
    for eps in (1e-6, 1e-10):
        expected = [eps, 1e-6, 1.0, eps * 2**42.5]
        got = moments.unpack(_pack(Moments(1, jnp.zeros(4), norms), "uint8", eps)).nu
        assert np.max(octaves(got, expected)) <= 1 / 6 + 1e-4
    nu = {"a": norms[1:3], "b": jnp.full(1, 1e30)}
    beside = moments.unpack(_pack(Moments(1, nu, nu), "uint8", 1e-8)).nu["a"]
    assert np.max(octaves(beside, norms[1:3])) <= 1 / 12 + 1e-4


_ONES = jnp.ones(2)
_UINT8 = adamaxw.adamaxw(1e-3, moment_dtype="uint8").init({"w": _ONES})
_CHAINED = optax.chain(optax.clip(1.0), adamaxw.adamaxw(1e-3)).init(_ONES)
_EXACT = adamaxw.adamax(1e-3, param_rounding="exact").init({"a": _ONES.astype(jnp.bfloat16)})


def _packed(mu, nu, name="uint8", eps=1e-8):
    return lambda: moments.pack(Moments(0, mu, nu), name, eps)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (_packed({"w": _ONES}, {"w": _ONES, "v": _ONES}), "(?s)mu.*nu.*v"),
        (_packed({"w": _ONES}, {"w": jnp.ones(())}), r"mu\['w'\]"),
        (_packed({"w": jnp.arange(2)}, {"w": _ONES}), r"mu\['w'\]"),
        (_packed({"w": _ONES}, {"w": _ONES.astype(jnp.complex64)}), r"mu\['w'\]"),
        (_packed(_ONES, _ONES, eps=1e-12), "eps"),
        (_packed(_ONES, _ONES, None, -1.0), "eps"),
        (_packed(_ONES, _ONES, "int8"), "moment_dtype"),
        (lambda: moments.pack(_UINT8, "uint8"), "Moments"),
        (lambda: moments.unpack(Moments(0, _ONES, _ONES)), "state"),
        (lambda: moments.unpack(_CHAINED), r"state\[1\]"),
        (lambda: moments.unpack(_UINT8._replace(nu_scale=None)), r"mu\['w'\]"),
        (lambda: moments.unpack(_UINT8._replace(mu={"w": jnp.zeros(2)})), r"mu\['w'\]"),
        (lambda: moments.master_params(_ONES, _CHAINED), r"state\[1\]"),
        (lambda: moments.master_params({"a": _ONES}, _EXACT), r"params\['a'\]"),
        (lambda: moments.master_params({"b": _ONES}, _EXACT), r"params.*residual"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    """Trees, shapes, kinds, states of another class or format, and bounds: by argument or path."""
    with pytest.raises((TypeError, ValueError), match=words):
        call()
