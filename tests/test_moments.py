"""Reading the moments of a state, and changing their format in mid-training."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, types_of
from flax import nnx
from gradients import gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates, x64
from oracle import octaves
from pure import as_pure

import adamaxw
from adamaxw import moments
from adamaxw.moments import Moments

pytestmark = pytest.mark.usefixtures("compile_fast")

_NAMES = (None, "bfloat16", "uint8")
_PAIRS = [(a, b) for a in _NAMES for b in _NAMES]
_PARAMS = {"w": np.linspace(-1, 1, 512, dtype=np.float32).reshape(16, 32), "b": np.ones(64)}
_STEPS = 250


@functools.cache
def _training(name, param_rounding="nearest"):
    """An optimizer, and a compiled loop from (params, state) over gradients."""
    opt = adamaxw.adamaxw(1e-3, moment_dtype=name, param_rounding=param_rounding)

    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        params = apply_updates(params, updates)
        return (params, state), None

    return opt, jax.jit(lambda carry, g: jax.lax.scan(step, carry, g)[0])


def _params(dtype="float32"):
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), _PARAMS)


@functools.cache
def _gradients():
    """With a drift, so that params move more than their noise."""
    return {
        name: jnp.asarray(0.3 + gradients("normal", _STEPS, p.shape, seed))
        for seed, (name, p) in enumerate(_PARAMS.items())
    }


def _run(carry, name, start, stop, param_rounding="nearest"):
    _, loop = _training(name, param_rounding)
    return loop(carry, jax.tree.map(lambda g: g[start:stop], _gradients()))


@functools.cache
def _trained(name, steps, param_rounding="nearest", dtype="float32"):
    opt, _ = _training(name, param_rounding)
    params = _params(dtype)
    return _run((params, opt.init(params)), name, 0, steps, param_rounding)


# As a compiled function, and much faster than operation by operation.
_unpack = jax.jit(moments.unpack)
_pack = jax.jit(moments.pack, static_argnums=(1, 2))


def _flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def _octaves(got, exact):
    return octaves(_flat(got), _flat(exact))


def _distance(params, others, start):
    """Root mean square of the difference, relative to how far the others have moved."""
    difference, movement = _flat(params) - _flat(others), _flat(others) - _flat(start)
    return np.sqrt(np.mean(difference**2) / np.mean(movement**2))


def test_what_is_public():
    """Functions of states, of those of others, of masters, and the tuple."""
    public = {
        name
        for name, value in vars(moments).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == moments.__name__
    }
    functions = {"unpack", "pack", "convert", "from_torch", "restart", "master_params"}
    assert public == {"Moments"} | functions
    assert Moments._fields == ("count", "mu", "nu", "residual", "seed")
    assert str(inspect.signature(moments.pack)).count("eps") == 1


@pytest.mark.parametrize("name", _NAMES)
def test_unpack_agrees_between_formats(name):
    """After 50 steps: the count, and the moments as far as the format holds them."""
    _, exact_state = _trained(None, 50)
    _, state = _trained(name, 50)
    exact, got = moments.unpack(exact_state), moments.unpack(state)
    assert got.count == exact.count == 50
    assert got.residual is None
    assert {x.dtype for x in jax.tree.leaves((got.mu, got.nu))} == {jnp.dtype("float32")}
    bound = {None: 1e-7, "bfloat16": np.log2(1 + 2.0**-8), "uint8": 1 / 12 + 1e-4}[name]
    assert np.max(_octaves(got.nu, exact.nu)) <= bound
    # A rounding at each step, of which about ten are remembered; grids as fine as these:
    step = {None: 1e-7, "bfloat16": 2.0**-7, "uint8": 2 * 1.25 / 127}[name]
    error = (_flat(got.mu) - _flat(exact.mu)) / _flat(exact.nu)
    assert np.max(np.abs(error)) < 4 * step
    assert np.abs(np.mean(error)) < 0.1 * step + 1e-7


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("name", _NAMES)
def test_pack_is_the_inverse_of_unpack(name, jitted):
    """In the format it is in already, a state comes back as it was, bit for bit but bfloat16 nu."""
    _, state = _trained(name, 50)
    unpack, pack = (_unpack, _pack) if jitted else (moments.unpack, moments.pack)
    back = pack(unpack(state), name, 1e-8)
    assert types_of(back) == types_of(state)
    jax.tree.map(np.testing.assert_array_equal, back.mu, state.mu)
    assert back.count == state.count
    if name == "bfloat16":
        norms = (_flat(_unpack(s).nu) for s in (back, state))
        np.testing.assert_allclose(*norms, rtol=2.0**-8)
    else:
        jax.tree.map(np.testing.assert_array_equal, back.nu, state.nu)
    if name == "uint8":
        # The norms between whole octaves are powers of two to 4e-6, and so is the way from the
        # largest norm down to eps.
        np.testing.assert_allclose(back.nu_scale, state.nu_scale, rtol=8e-6)


def test_uint8_moments_survive_wherever_the_scale_stands():
    """What a packed state decodes to is what was packed: at eps itself, and a whole step below."""
    # All codes of the norm, of which none may fall out of the grid.
    codes = jnp.arange(256, dtype=jnp.uint8), jnp.arange(-127, 129).clip(-127, 127).astype("int8")
    params = jnp.zeros(256)

    def run(b2, eps):
        opt = adamaxw.adamax(1e-3, b2=b2, eps=eps, moment_dtype="uint8")

        def step(state, _):
            _, new = opt.update(params, state)
            exact = moments.unpack(new)
            back = moments.unpack(moments.pack(exact, "uint8", eps))
            return new, (exact.mu, back.mu, exact.nu, back.nu)

        state = opt.init(params)._replace(nu=codes[0], mu=codes[1])
        return jax.lax.scan(step, state, length=200)[1]

    b2, eps = (
        x.ravel()
        for x in np.meshgrid(
            np.float32([1.0, 0.5, 0.9, 0.999, 0.99999]), np.float32([1e-10, 1e-8, 1e-3])
        )
    )
    mu, back_mu, nu, back_nu = jax.jit(jax.vmap(run))(b2, eps)
    for lane in range(len(b2)):
        case = f"b2={b2[lane]}, eps={eps[lane]}"
        np.testing.assert_allclose(back_nu[lane], nu[lane], rtol=1e-5, err_msg=case)
        np.testing.assert_allclose(back_mu[lane], mu[lane], rtol=1e-5, err_msg=case)


@pytest.mark.parametrize(("of", "to"), _PAIRS)
def test_training_goes_on_in_another_format(of, to):
    """50 steps in one, 200 in the other: params as if in float32 from start to end."""
    params, state = _trained(of, 50)
    # Leaves where they were, so that the compiled loop serves every pair.
    changed = _pack(_unpack(state), to, 1e-8)
    opt, _ = _training(to)
    assert types_of(changed) == types_of(opt.init(_params()))
    params, state = _run((params, changed), to, 50, _STEPS)
    assert state.count == _STEPS
    exact, _ = _trained(None, _STEPS)
    # Norms are off by up to 6% in uint8, 0.4% in bfloat16, differently in each element.
    bound = {None: 1e-6, "bfloat16": 0.005, "uint8": 0.05}
    assert _distance(params, exact, _params()) <= max(bound[of], bound[to])
    # And beside the run that stays in the format, with other noise than its own in the first steps.
    same, _ = _trained(to, _STEPS)
    assert _distance(params, same, _params()) <= 2 * max(bound[of], bound[to])


@pytest.mark.parametrize(("of", "to"), _PAIRS)
def test_conversions_keep_the_residual(of, to):
    """With param_rounding="exact" the float32 weights are those from before, and train on."""
    params, state = _trained(of, 50, "exact", "bfloat16")
    converted = _pack(_unpack(state), to, 1e-8)
    jax.tree.map(np.testing.assert_array_equal, converted.residual, state.residual)
    before, after = (moments.master_params(params, s) for s in (state, converted))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    params, state = _run((params, converted), to, 50, _STEPS, "exact")
    # The gradients are float32, so that a float32 run from the same start is the same run.
    opt, _ = _training(None)
    start = jax.tree.map(lambda p: p.astype(jnp.float32), _params("bfloat16"))
    exact, _ = _run((start, opt.init(start)), None, 0, _STEPS)
    bound = {None: 1e-5, "bfloat16": 0.005, "uint8": 0.05}
    distance = _distance(moments.master_params(params, state), exact, start)
    assert distance <= max(bound[of], bound[to])


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_moments_of_your_own(dtype, name):
    """NumPy arrays in any floating dtype and a Python count, as a conversion may bring them."""
    rng = np.random.default_rng(0)
    mu = np.asarray(rng.uniform(-1, 1, size=(4, 8)), jnp.dtype(dtype))
    nu = np.asarray(np.abs(mu.astype(np.float64)) + 0.5, jnp.dtype(dtype))
    state = moments.pack(Moments(7, {"w": mu}, {"w": nu}), name)
    params = {"w": jnp.ones((4, 8))}
    opt = adamaxw.adamaxw(1e-3, moment_dtype=name)
    assert types_of(state) == types_of(opt.init(params))
    got = moments.unpack(state)
    assert got.count == 7
    bound = {None: 1e-7, "bfloat16": np.log2(1 + 2.0**-8), "uint8": 1 / 12 + 1e-4}[name]
    assert np.max(_octaves(got.nu["w"], nu)) <= bound
    error = np.abs(np.asarray(got.mu["w"], np.float64) - mu.astype(np.float64))
    assert np.max(error / nu.astype(np.float64)) <= {None: 1e-7}.get(name, 1.3 / 127)
    jax.eval_shape(opt.update, params, state, params)


def test_float64_moments_stay_float64_under_x64():
    """Without a narrower format; beside a float32 leaf, which stays float32."""
    with x64():
        params = {"double": jnp.ones(2), "single": jnp.ones(2, jnp.float32)}
        opt = adamaxw.adamaxw(1e-3)
        state = jax.jit(opt.update)(params, opt.init(params), params)[1]
        got = moments.unpack(state)
        assert got.mu["double"].dtype == got.nu["double"].dtype == jnp.float64
        back = moments.pack(got)
        assert types_of(back) == types_of(state)
        jax.tree.map(np.testing.assert_array_equal, back, state)
        small = moments.pack(got, "uint8")
        assert small.nu["double"].dtype == small.nu["single"].dtype == jnp.uint8
        np.testing.assert_allclose(moments.unpack(small).nu["double"], 1.0, rtol=0.06)


@pytest.mark.parametrize("name", _NAMES)
def test_unpack_of_a_new_state(name):
    """Zero first moments, norms of zero or about eps; packed, it trains like a new one."""
    opt, _ = _training(name)
    params = _params()
    got = _unpack(opt.init(params))
    assert got.count == 0
    assert np.all(_flat(got.mu) == 0)
    assert np.all(_flat(got.nu) <= 1e-8 * (1 + 1e-5))
    for other in _NAMES:
        state = _pack(got, other, 1e-8)
        trained, _ = _run((params, state), other, 0, 50)
        exact, _ = _trained(other, 50)
        assert _distance(trained, exact, params) <= {None: 1e-6, "bfloat16": 5e-3}.get(other, 0.05)


def test_a_tree_without_leaves():
    """Nothing to convert is not an error."""
    for name in _NAMES:
        state = moments.pack(Moments(3, {}, {}), name)
        assert moments.unpack(state)[:4] == Moments(3, {}, {}, None)[:4]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("name", _NAMES)
def test_norms_that_are_not_finite_show_after_packing(name, bad):
    """As NaN in mu of that element; the others are none the worse, and the scale is theirs."""
    mu, nu = jnp.full(6, 0.5), jnp.ones(6)
    clean = moments.unpack(_pack(Moments(1, mu, nu), name, 1e-8))
    for spoiled in (Moments(1, mu, nu.at[2].set(bad)), Moments(1, mu.at[2].set(bad), nu)):
        got = moments.unpack(_pack(spoiled, name, 1e-8))
        if name == "uint8" or not np.isfinite(spoiled.nu[2]):
            assert np.isnan(got.mu[2])
        assert not np.isfinite(got.mu[2])
        for a, b in zip((clean.mu, clean.nu), (got.mu, got.nu), strict=True):
            np.testing.assert_array_equal(np.delete(a, 2), np.delete(b, 2))


@pytest.mark.parametrize(("of", "to"), _PAIRS)
def test_leaves_that_do_not_train_pass(of, to):
    """Integer and boolean leaves, None and MaskedNode; int8 and uint8 are no codes here."""
    params = {
        "w": jnp.ones(2),
        "int8": jnp.arange(2, dtype=jnp.int8),
        "uint8": jnp.arange(2, dtype=jnp.uint8),
        "flag": jnp.array([True]),
        "none": None,
        "masked": optax.MaskedNode(),
    }
    state = adamaxw.adamaxw(1e-3, moment_dtype=of).init(params)
    unpacked = jax.eval_shape(moments.unpack, state)
    assert jax.tree.structure(unpacked.mu) == jax.tree.structure(params)
    assert [unpacked.mu[x].dtype for x in ("w", "int8", "uint8")] == ["float32", "int8", "uint8"]
    packed = jax.eval_shape(functools.partial(moments.pack, moment_dtype=to), unpacked)
    expected = adamaxw.adamaxw(1e-3, moment_dtype=to).init(params)
    assert types_of(packed) == types_of(expected)


def test_complex_moments():
    """Kept as they are without a format, refused with their path by the narrow ones."""
    params = {"w": jnp.ones(2), "z": [jnp.ones(2, jnp.complex64)]}
    opt = adamaxw.adamaxw(1e-3)
    state = opt.update(params, opt.init(params), params)[1]
    got = moments.unpack(state)
    assert got.mu["z"][0].dtype == jnp.complex64
    jax.tree.map(np.testing.assert_array_equal, moments.pack(got), state)
    for name in ("uint8", "bfloat16"):
        with pytest.raises(TypeError, match=rf"mu\['z'\]\[0\] is complex64.*moment_dtype={name}"):
            moments.pack(got, name)


_ONES = jnp.ones(2)


@pytest.mark.parametrize(
    ("mu", "nu", "error", "message"),
    [
        ({"w": _ONES}, {"v": _ONES}, ValueError, "(?s)mu and nu differ.*w"),
        ({"w": _ONES}, {"w": _ONES, "v": _ONES}, ValueError, r"(?s)mu and nu differ.*\bv\b"),
        ({"w": _ONES}, {"w": [_ONES]}, ValueError, r"(?s)\['w'\]"),
        ([_ONES], (_ONES,), ValueError, "(?s)mu and nu differ"),
        ({"w": _ONES}, {"w": jnp.ones(3)}, ValueError, r"mu\['w'\] has shape \(2,\).*\(3,\)"),
        ({"w": _ONES}, {"w": jnp.ones(())}, ValueError, r"mu\['w'\] has shape \(2,\).*\(\)"),
        ({"w": "text"}, {"w": _ONES}, TypeError, r"mu\['w'\] and nu\['w'\] must be arrays.*text"),
        ({"w": _ONES}, {"w": None}, ValueError, r"(?s)\['w'\]"),
    ],
)
def test_trees_that_differ_are_refused(mu, nu, error, message):
    """With the path, and never broadcast."""
    with pytest.raises(error, match=message):
        moments.pack(Moments(0, mu, nu), "uint8")


@pytest.mark.parametrize(
    "wrong",
    [
        (),
        None,
        _ONES,
        Moments(0, _ONES, _ONES),
        optax.adamaxw(1e-3).init(_ONES),
        optax.chain(optax.clip(1.0), adamaxw.adamaxw(1e-3)).init(_ONES),
    ],
)
def test_what_is_no_state_is_refused(wrong):
    """With where to look for it."""
    with pytest.raises(TypeError, match=r"must be an AdamaxState, got a .*such as state\[1\]"):
        moments.unpack(wrong)
    with pytest.raises(TypeError, match=r"must be an AdamaxState, got a .*such as state\[1\]"):
        moments.master_params(_ONES, wrong)
    chained = optax.chain(optax.clip(1.0), adamaxw.adamaxw(1e-3)).init(_ONES)
    assert moments.unpack(chained[1]).count == 0


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s._replace(nu_scale=None),
        lambda s: s._replace(nu={"w": s.nu["w"].astype(jnp.int32)}),
        lambda s: s._replace(mu={"w": s.mu["w"].astype(jnp.float32)}),
        lambda s: s._replace(nu={"w": s.nu["w"].astype(jnp.float16)}),
    ],
)
def test_moments_of_no_format_are_refused(spoil):
    """What was cast is not guessed at; the path is named."""
    state = adamaxw.adamaxw(1e-3, moment_dtype="uint8").init({"w": _ONES})
    with pytest.raises(TypeError, match=r"state\.mu\['w'\] and state\.nu\['w'\] are no moments"):
        moments.unpack(spoil(state))


@pytest.mark.parametrize(
    ("name", "eps", "message"),
    [
        ("uint8", 1e-12, "from 1e-10"),
        ("uint8", 0.0, "eps must satisfy"),
        ("bfloat16", -1.0, "eps must satisfy"),
        (None, np.nan, "eps must satisfy"),
    ],
)
def test_an_eps_out_of_bounds_is_refused(name, eps, message):
    """As the optimizer itself does."""
    with pytest.raises(ValueError, match=message):
        moments.pack(Moments(0, _ONES, _ONES), name, eps)


def test_eps_sets_the_range_of_uint8():
    """Norms below it are stored as about eps, those far above it as the largest."""
    norms = jnp.array([1e-12, 1e-6, 1.0, 1e9])
    got = moments.unpack(_pack(Moments(1, jnp.zeros(4), norms), "uint8", 1e-6)).nu
    assert np.max(_octaves(got, np.array([1e-6, 1e-6, 1.0, 1e-6 * 2**42.5]))) <= 1 / 6 + 1e-4
    smaller = moments.unpack(_pack(Moments(1, jnp.zeros(2), norms[:2]), "uint8", 1e-10)).nu
    assert np.max(_octaves(smaller, np.array([1e-10, 1e-6]))) <= 1 / 6 + 1e-4


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shardings_are_kept(axis_type, jitted):
    """On eight devices: through unpack and pack, to every format, leaf by leaf."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    specs = {"w": P("data", "model"), "b": P("model"), "s": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = {"w": jnp.ones((8, 8)), "b": jnp.ones(4), "s": jnp.ones(())}
    unpack, pack, formats = _unpack, _pack, _NAMES
    if not jitted:
        # Operation by operation it takes long: one leaf, one format.
        unpack, pack, formats = moments.unpack, moments.pack, ("uint8",)
        params, shardings = {"w": params["w"]}, {"w": shardings["w"]}
    params = jax.device_put(params, shardings)

    def assert_sharded(moment):
        for name, sharding in shardings.items():
            assert moment[name].sharding.is_equivalent_to(sharding, moment[name].ndim), name

    everywhere = NamedSharding(mesh, P())
    for of in formats:
        opt = adamaxw.adamaxw(1e-3, moment_dtype=of)
        state = jax.jit(opt.update)(params, opt.init(params), params)[1]
        unpacked = unpack(state)
        assert_sharded(unpacked.mu)
        assert_sharded(unpacked.nu)
        to = {None: "uint8", "uint8": "bfloat16", "bfloat16": None}[of]
        packed = pack(unpacked, to, 1e-8)
        assert_sharded(packed.mu)
        assert_sharded(packed.nu)
        target = adamaxw.adamaxw(1e-3, moment_dtype=to)
        assert types_of(packed) == types_of(target.init(params))
        assert packed.count.sharding.is_equivalent_to(everywhere, 0)
        if to is not None:
            assert packed.nu_scale.sharding.is_equivalent_to(everywhere, 0)
        # Values as on one device.
        alone = _pack(jax.device_get(unpacked), to, 1e-8)
        jax.tree.map(np.testing.assert_array_equal, packed, alone)


def test_a_state_is_not_taken_for_its_moments():
    """The two have the same fields, but codes are no moments."""
    state = adamaxw.adamax(1e-3, moment_dtype="uint8").init(jnp.zeros(2))
    with pytest.raises(TypeError, match="moments must be Moments"):
        moments.pack(state, "uint8")


@pytest.mark.parametrize(
    ("mu", "nu"),
    [
        (jnp.zeros(2, jnp.int32), jnp.ones(2)),
        (jnp.zeros(2), jnp.ones(2, jnp.complex64)),
        (jnp.zeros(2), jnp.ones(2, jnp.int32)),
    ],
)
def test_moments_of_mixed_kinds_are_refused(mu, nu):
    """With their path."""
    with pytest.raises(TypeError, match=r"mu\['w'\]"):
        moments.pack(Moments(0, {"w": mu}, {"w": nu}), "uint8")


@pytest.mark.parametrize("count", [3.7, jnp.zeros(()), None])
def test_a_count_that_is_no_integer_is_refused(count):
    """Rather than cut off."""
    with pytest.raises(TypeError, match="count must be an integer"):
        moments.pack(Moments(count, jnp.zeros(2), jnp.ones(2)))


def test_norms_far_apart():
    """The largest norm of the tree sets the grid for all, however large it is; -1 is none."""
    mine = Moments(
        5,
        {"a": jnp.array([0.1, 0.2, 0.3]), "b": jnp.ones(1)},
        {"a": jnp.array([1.0, 2.0, -1.0]), "b": jnp.full(1, 1e30)},
    )
    back = moments.unpack(moments.pack(mine, "uint8"))
    np.testing.assert_allclose(back.nu["a"][:2], [1.0, 2.0], rtol=0.06)
    np.testing.assert_allclose(back.mu["a"][:2], [0.1, 0.2], rtol=0.06)
    assert np.isnan(back.mu["a"][2])


def test_the_smallest_eps_in_float64():
    """It is allowed in whatever dtype it comes."""
    with x64():
        adamaxw.adamax(1e-3, eps=jnp.asarray(1e-10), moment_dtype="uint8")


def test_master_params_of_what_is_no_array_is_refused():
    """With the path, and both trees by name where they differ."""
    state = adamaxw.adamax(1e-3, param_rounding="exact").init({"a": jnp.ones(2, jnp.bfloat16)})
    with pytest.raises(ValueError, match=r"params\['a'\] must be bfloat16"):
        moments.master_params({"a": 1.0}, state)
    with pytest.raises(ValueError, match=r"params and state\.residual differ in structure"):
        moments.master_params({"b": jnp.ones(2, jnp.bfloat16)}, state)


def test_of_flax_nnx():
    """The state and params of `nnx.Optimizer` hold Variables; what is read from them does not."""
    model = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    opt = adamaxw.adamaxw(1e-3, moment_dtype="uint8", param_rounding="exact")
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    params, state = nnx.state(model, nnx.Param), optimizer.opt_state
    pure_params, pure_state = as_pure(params), as_pure(state)
    assert_equal(moments.unpack(state), moments.unpack(pure_state))
    masters = moments.master_params(params, state)
    assert_equal(masters, moments.master_params(pure_params, pure_state))
    assert masters["kernel"].dtype == jnp.float32
