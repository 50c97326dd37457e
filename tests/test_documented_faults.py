"""What README.md and docs/ say of faults, each with that very fault; the rest is in other tests."""

import shutil
import warnings
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from equality import assert_equal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import adamaxw
from adamaxw import masks, sharding

# The wrappers of Optax promote.
pytestmark = pytest.mark.usefixtures("standard_promotion", "compile_fast")

_MOMENTS = [None, "bfloat16", "uint8"]
_ROUNDINGS = ["nearest", "stochastic", "exact"]
_PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}


def _run(opt, params, factors):
    """Params and state after steps with gradients of ones, times each factor."""
    state, step = opt.init(params), jax.jit(opt.update)
    for factor in factors:
        grads = jax.tree.map(lambda p, factor=factor: jnp.full_like(p, factor), params)
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# docs/optax.md -----------------------------------------------------------------------------------


def test_apply_if_finite_gives_up():
    """After 5 such steps in a row it gives up: the next goes through."""
    opt = optax.apply_if_finite(adamaxw.adamaxw(1e-3), max_consecutive_errors=5)
    assert np.all(np.isfinite(_run(opt, _PARAMS, [1, *[np.inf] * 5, 1])[0]["w"]))
    assert np.all(np.isnan(_run(opt, _PARAMS, [1, *[np.nan] * 6])[0]["w"]))


@pytest.mark.parametrize("wrap", [optax.MultiSteps, optax.apply_if_finite])
def test_float0_in_wrappers(wrap):
    """MultiSteps and apply_if_finite do not take float0."""
    opt = wrap(adamaxw.adamaxw(1e-3), 2)
    params = {"w": jnp.ones(3), "n": jnp.arange(3)}
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    with pytest.raises(TypeError, match="float0"):
        opt.update(grads, opt.init(params), params)


def test_apply_updates_and_none():
    """optax.apply_updates takes None only where params are None."""
    assert optax.apply_updates({"w": None}, {"w": None}) == {"w": None}
    with pytest.raises(TypeError):
        optax.apply_updates({"w": jnp.ones(2)}, {"w": None})


def test_complex_gradients_that_are_not_conjugated():
    """Without that, imaginary parts go the wrong way, for Optax as well."""
    for make in (adamaxw.adamaxw, optax.adamaxw):
        opt, p = make(0.1, weight_decay=0.0), jnp.zeros((), jnp.complex64)
        state = opt.init(p)
        for _ in range(20):
            grads = jax.grad(lambda p: jnp.abs(p - (1 + 2j)) ** 2)(p)
            updates, state = opt.update(grads, state, p)
            p += updates
        assert p.imag < -1
        assert p.real > 0.5


def test_updates_turned_around_after_the_optimizer():
    """Turn the gradients, not the updates after it, where the decay would turn as well."""
    opt = adamaxw.adamaxw(0.1, weight_decay=0.5)
    after, _ = _run(optax.chain(opt, optax.scale(-1.0)), _PARAMS, [0.0])
    before, _ = _run(optax.chain(optax.scale(-1.0), opt), _PARAMS, [0.0])
    assert np.all(after["w"] > 1)
    assert np.all(before["w"] < 1)


# docs/algorithm.md -------------------------------------------------------------------------------


def test_gradients_that_are_flushed_to_zero():
    """Gradients below about 1e-37 count as zero."""
    params = jnp.ones(2)
    opt = adamaxw.adamaxw(1e-3, eps=1e-30)
    for size, counts in ((1e-38, False), (1e-36, True)):
        _, state = opt.update(jnp.full(2, size), opt.init(params), params)
        assert np.all((state.mu > 0) == counts)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", "nearest"), ("bfloat16", "exact")])
def test_a_decay_below_float32(dtype, rounding):
    """Below 2^-25 it is lost, in the float32 weights of "exact" too; portions are not."""

    def kept(weight_decay):
        opt = adamaxw.adamaxw(1e-4, weight_decay=weight_decay, param_rounding=rounding)
        params, state = _run(opt, jnp.linspace(1, 2, 8, dtype=dtype), [0.0] * 100)
        return adamaxw.moments.master_params(params, state) / jnp.linspace(1, 2, 8, dtype=dtype)

    assert np.all(kept(1e-4) == 1)
    portions = kept(lambda count: jnp.where(count % 50 == 49, 50 * 1e-4, 0.0))
    np.testing.assert_allclose(portions, np.exp(-1e-8 * 100), rtol=0, atol=2.5e-7)
    assert np.all(portions < 1)


# docs/masks.md -----------------------------------------------------------------------------------


def test_a_mask_and_plain_containers():
    """Pass static_args where the state goes through something such as flax.serialization."""
    state = optax.inject_hyperparams(adamaxw.adamaxw)(0.1, mask=masks.matrices).init(_PARAMS)
    with pytest.raises(TypeError, match="serialize"):
        flax.serialization.to_bytes(state)
    inject = optax.inject_hyperparams(adamaxw.adamaxw, static_args=("mask",))
    state = inject(0.1, mask=masks.matrices).init(_PARAMS)
    assert_equal(state, flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)))


def test_masks_inside_flatten():
    """Patterns and trees are an error there, and masks.matrices chooses nothing."""

    def flat(mask):
        return optax.flatten(adamaxw.adamaxw(1.0, weight_decay=0.5, mask=mask))

    for mask in (masks.matching("w"), {"w": True, "b": False}):
        with pytest.raises(ValueError, match="mask"):
            flat(mask).init(_PARAMS)
    assert_equal(_run(flat(masks.matrices), _PARAMS, [0.0])[0], _PARAMS)
    assert np.all(_run(flat(None), _PARAMS, [0.0])[0]["b"] == 0.5)


_FROZEN = jnp.arange(4)[:, None] < 2


@pytest.mark.parametrize(("moment_dtype", "rounding"), list(zip(_MOMENTS, _ROUNDINGS, strict=True)))
def test_frozen_rows(moment_dtype, rounding):
    """Zero gradients do not hold them; zero updates do, with float32 weights that stay close."""
    opt = adamaxw.adamaxw(
        0.02, weight_decay=0.5, moment_dtype=moment_dtype, param_rounding=rounding
    )
    start = jnp.linspace(0.5, 2, 16, dtype=jnp.bfloat16).reshape(4, 4)
    held = optax.chain(opt, optax.stateless(lambda u, _: jnp.where(_FROZEN, 0, u)))
    params, state = _run(held, start, [1.0] * 10 + [-0.3] * 40)
    np.testing.assert_array_equal(params[:2], start[:2])
    assert np.all(params[2:] != start[2:])
    weights = adamaxw.moments.master_params(params, state[0]).astype(jnp.float32)
    assert np.all(np.abs(weights / start.astype(jnp.float32) - 1)[:2] <= 2**-8)

    zeroed = optax.chain(optax.stateless(lambda g, _: jnp.where(_FROZEN, 0, g)), opt)
    params, _ = _run(zeroed, start, [1.0] * 50)
    assert np.any(params[:2] != start[:2])  # The decay.
    _, state = _run(opt, start, [1.0] * 10)
    undecayed = adamaxw.adamax(0.02, moment_dtype=moment_dtype, param_rounding=rounding)
    updates, _ = undecayed.update(jnp.zeros_like(start), state, start)
    assert np.any(updates[:2] != 0)  # What the first moment remembers.


# docs/low_precision.md ---------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
@pytest.mark.parametrize(
    "after",
    [
        optax.scale_by_schedule(lambda count: jnp.where(count < 5, 1.0, 0.1)),
        optax.contrib.reduce_on_plateau(patience=5),
    ],
)
def test_what_makes_updates_smaller_afterwards(rounding, after):
    """Makes training stand still without a word; the same learning rate inside does not."""
    params = jnp.ones(256, jnp.bfloat16)
    opt = adamaxw.adamaxw(3e-3, param_rounding=rounding)
    opt = optax.chain(opt, after)
    state, step = opt.init(params), jax.jit(opt.update)
    seen = []
    for _ in range(20):
        updates, state = step(jnp.ones_like(params), state, params, value=jnp.float32(1))
        params = optax.apply_updates(params, updates)
        seen.append(params)
    assert np.any(seen[4] != seen[0])
    assert_equal(seen[-1], seen[6])

    inside = adamaxw.adamaxw(
        lambda count: jnp.where(count < 5, 3e-3, 3e-4), param_rounding=rounding
    )
    assert np.any(_run(inside, params, [1.0] * 20)[0] != _run(inside, params, [1.0] * 7)[0])


def test_updates_of_exact_under_strict_promotion():
    """Optax's sum of bfloat16 and float32 is an error, and a cast by hand is none."""
    params = jnp.ones(3, jnp.bfloat16)
    opt = adamaxw.adamaxw(1e-3, param_rounding="exact")
    updates, _ = opt.update(params, opt.init(params), params)
    with jax.numpy_dtype_promotion("strict"):
        with pytest.raises(ValueError, match="promotion"):
            optax.apply_updates(params, updates)
        wide = optax.apply_updates(params.astype(jnp.float32), updates)
    assert_equal(wide.astype(jnp.bfloat16), optax.apply_updates(params, updates))


# docs/frameworks/ -------------------------------------------------------------------------------


def test_paths_of_boxes_of_linen():
    """Their paths end in /value: write matching("kernel"), not matching("kernel$")."""
    boxed = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    params = nn.Dense(2, kernel_init=boxed).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    with pytest.raises(ValueError, match=r"kernel\$.* matches no path .*kernel/value"):
        adamaxw.adamaxw(1e-3, mask=masks.matching("kernel$")).init(params)
    assert masks.matching("kernel")(params)["kernel"].value


def test_apply_if_finite_inside_multi_steps():
    """A NaN gets into the mean and stays: no step is taken, and then everything is NaN."""
    inside = optax.MultiSteps(optax.apply_if_finite(adamaxw.adamaxw(1e-3), 5), 2)
    params, _ = _run(inside, _PARAMS, [np.nan, *[1.0] * 9])
    assert_equal(params, _PARAMS)
    params, _ = _run(inside, _PARAMS, [np.nan, *[1.0] * 11])
    assert np.all(np.isnan(params["w"]))


def test_how_many_bad_batches_in_a_row():
    """Around MultiSteps, apply_if_finite gives up after 5; skip_not_finite never does."""
    around = optax.MultiSteps(adamaxw.adamaxw(1e-3), 2).gradient_transformation()
    around = optax.apply_if_finite(around, 5)
    bad = [1.0, *[np.nan] * 5, 1.0]
    params, _ = _run(around, _PARAMS, bad)
    assert_equal(params, _run(around, _PARAMS, [1.0, 1.0])[0])
    params, _ = _run(around, _PARAMS, [1.0, *[np.nan] * 6])
    assert np.all(np.isnan(params["w"]))
    skips = optax.MultiSteps(adamaxw.adamaxw(1e-3), 2, should_skip_update_fn=optax.skip_not_finite)
    params, _ = _run(skips, _PARAMS, [1.0, *[np.nan] * 50, 1.0])
    assert_equal(params, _run(skips, _PARAMS, [1.0, 1.0])[0])


# docs/checkpoints.md -----------------------------------------------------------------------------


def test_states_that_come_back_otherwise():
    """What comes back as a dict or a list is refused, and so are bytes without their dtype."""
    opt = adamaxw.adamaxw(1e-3, moment_dtype="bfloat16")
    state = opt.init(_PARAMS)
    for plain in (state._asdict(), jax.tree.leaves(state), tuple(state)):
        with pytest.raises(TypeError, match="must be the AdamaxState that init returned"):
            opt.update(_PARAMS, plain, _PARAMS)
    void = jax.tree.map(lambda x: np.asarray(x).view("V2"), state.mu)
    with pytest.raises(TypeError, match=r"state\.mu\['b'\].*\|V2"):
        opt.update(_PARAMS, state._replace(mu=void), _PARAMS)
    seen = jax.tree.map(lambda x: x.view(ml_dtypes.bfloat16), void)
    opt.update(_PARAMS, state._replace(mu=seen), _PARAMS)


# What Orbax has begun to read when something else fails complains when it is collected.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
def test_damaged_checkpoints(tmp_path):
    """Orbax notices a file that it needs and misses, but may load a flipped bit as if right."""
    tree = {"x": np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)}
    saved, damaged = tmp_path / "saved", tmp_path / "damaged"
    ocp.save(saved, tree)
    files = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.ShapeDtypeStruct(tree["x"].shape, jnp.float32, sharding=one)
    largest = max(files, key=lambda path: (saved / path).stat().st_size)

    def loaded(path, content):
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(saved, damaged)
        (damaged / path).unlink()
        if content is not None:
            (damaged / path).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ocp.load(damaged, {"x": wanted})["x"]

    noticed = set()
    for path in files:
        content = (saved / path).read_bytes()
        for damage in (None, content[: len(content) // 2]):
            try:
                np.testing.assert_array_equal(loaded(path, damage), tree["x"])
            except AssertionError:
                raise
            except Exception:  # Of Orbax or TensorStore, of many kinds.
                noticed.add((path, damage is None))
    assert {(largest, True), (largest, False)} <= noticed

    flipped = bytearray((saved / largest).read_bytes())
    flipped[len(flipped) // 2] ^= 4
    assert np.sum(loaded(largest, flipped) != tree["x"]) >= 1


# docs/conversions.md -----------------------------------------------------------------------------


def test_schedules_that_stand_elsewhere():
    """An error: set them first to the count to go on with, as by optax.tree.set."""
    old = optax.adamaxw(optax.constant_schedule(1e-3))
    state: Any = old.init(_PARAMS)
    _, state = old.update(_PARAMS, state, _PARAMS)
    like = adamaxw.adamaxw(1e-3).init(_PARAMS)
    apart = (state[0]._replace(count=jnp.int32(7)), *state[1:])
    with pytest.raises(ValueError, match=r"7 updates, but its schedules stand at \[1\]"):
        adamaxw.moments.convert(apart, like)
    together = optax.tree.set(apart, count=jnp.int32(7))
    assert adamaxw.moments.convert(together, like).count == 7


def _grown(tree, rows):
    def pad(x):
        return None if x is None else jnp.pad(x, ((0, rows - len(x)), (0, 0)))

    return jax.tree.map(pad, tree, is_leaf=lambda x: x is None)


@pytest.mark.parametrize("moment_dtype", _MOMENTS)
@pytest.mark.parametrize(
    ("rounding", "dtype"),
    [("nearest", "float32"), ("stochastic", "bfloat16"), ("exact", "bfloat16")],
)
def test_a_larger_vocabulary(moment_dtype, rounding, dtype):
    """Old rows go on as they would have, new ones begin with (1 - b1) of the learning rate."""
    opt = adamaxw.adamaxw(
        2.0**-5, weight_decay=0.0, moment_dtype=moment_dtype, param_rounding=rounding
    )
    small = {"e": jnp.linspace(-1, 1, 24, dtype=dtype).reshape(6, 4)}
    small, state = _run(opt, small, [*[1.0, -0.5, 0.25] * 5, *[1.0] * 15])
    moments = adamaxw.moments.unpack(state)
    large = _grown(small, 8)
    packed = adamaxw.moments.pack(
        moments._replace(**{k: _grown(getattr(moments, k), 8) for k in ("mu", "nu", "residual")}),
        moment_dtype,
    )
    # Without a seed, which goes for one of 0.
    expected = opt.init(large)._replace(seed=packed.seed)
    assert jax.tree.map(jax.typeof, packed) == jax.tree.map(jax.typeof, expected)
    if rounding == "exact":
        weights = adamaxw.moments.master_params(large, packed)
        assert_equal(_grown(adamaxw.moments.master_params(small, state), 8), weights)
        with pytest.raises(TypeError, match=r"residual\['e'\] must be int16 of shape \(8, 4\)"):
            opt.update(large, packed._replace(residual=moments.residual), large)

    gradients = jax.tree.map(jnp.ones_like, large)
    updates, _ = opt.update(gradients, packed, large)
    expected, _ = opt.update(jax.tree.map(jnp.ones_like, small), state, small)
    # "bfloat16" rounds norms once more when it packs; a bfloat16 may then tip over.
    atol = 2.0**-5 * 2**-7 + (2.0**-7 if rounding == "stochastic" else 0)
    np.testing.assert_allclose(
        updates["e"][:6].astype(np.float32), expected["e"].astype(np.float32), rtol=0, atol=atol
    )
    new = adamaxw.moments.unpack(opt.update(gradients, packed, large)[1])
    first = (new.mu["e"] / new.nu["e"])[6:]
    np.testing.assert_allclose(first.mean(), 0.1, rtol=0.13)
    np.testing.assert_allclose(
        updates["e"][6:].astype(np.float32).mean(), -(2.0**-5) * 0.1 / (1 - 0.9**31), rtol=0.2
    )


# docs/diagnostics.md -----------------------------------------------------------------------------


def test_diagnostics_with_another_eps():
    """Pass eps if the optimizer does not have the default: else at_floor is wrong."""
    opt = adamaxw.adamaxw(1e-3, eps=1e-6)
    updates, state = opt.update(jax.tree.map(jnp.zeros_like, _PARAMS), opt.init(_PARAMS), _PARAMS)
    assert adamaxw.diagnostics(updates, state, _PARAMS)["at_floor"] == 0
    assert adamaxw.diagnostics(updates, state, _PARAMS, eps=1e-6)["at_floor"] == 1


def test_what_helps_against_saturation():
    """Raise eps, or scale the gradients down."""

    def saturated(eps, size):
        opt = adamaxw.adamaxw(1e-3, eps=eps, moment_dtype="uint8")
        grads = jax.tree.map(lambda p: jnp.full_like(p, size), _PARAMS)
        updates, state = opt.update(grads, opt.init(_PARAMS), _PARAMS)
        return adamaxw.diagnostics(updates, state, _PARAMS, eps=eps)["saturated"]

    assert [saturated(*x) for x in ((1e-8, 1e5), (1e-6, 1e5), (1e-8, 1e3))] == [1, 0, 0]


# docs/scaling.md ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_spread_state_without_out_shardings(wrap):
    """Without it, and outside jax.jit, the parameters come back split, too."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put({"w": jnp.ones((16, 4))}, NamedSharding(mesh, P()))
    opt = adamaxw.adamaxw(1e-3)
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)

    def step(params, state):
        updates, state = opt.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = wrap(step)(params, state)
    assert not params["w"].sharding.is_fully_replicated


# docs/numerics.md --------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", _ROUNDINGS)
def test_parameters_beyond_bfloat16(rounding):
    """They are inf, and NaN a step later; without decay, "nearest" leaves them at inf."""
    start = jnp.full(2, 3.3e38, jnp.bfloat16)
    for opt, stays in (
        (adamaxw.adamaxw(1e38, weight_decay=0.0, param_rounding=rounding), False),
        (adamaxw.adamax(1e38, param_rounding=rounding), rounding == "nearest"),
    ):
        assert np.all(np.isposinf(_run(opt, start, [-1.0])[0].astype(jnp.float32)))
        later = _run(opt, start, [-1.0, 0.0])[0].astype(jnp.float32)
        assert np.all(np.isposinf(later) if stays else np.isnan(later))


def test_stochastic_at_the_ceiling_of_the_count():
    """The noise stays that of the last count: a parameter may move by a whole unit at each step.

    Steps are a tenth of a unit: a tenth of the parameters moves at every step, the others never.
    """
    opt = adamaxw.adamax(2.0**-8 * 0.1, param_rounding="stochastic")
    start = jnp.ones(1000, jnp.bfloat16) * 1.5
    state = opt.init(start)._replace(count=jnp.int32(2**31 - 1), mu=jnp.ones(1000))
    params = start
    for _ in range(10):
        updates, state = opt.update(jnp.ones_like(params), state, params)
        params = optax.apply_updates(params, updates)
    moved = np.asarray((start - params).astype(jnp.float32)) / 2.0**-7
    assert set(moved) == {0.0, 10.0}


def test_uint8_far_below_eps():
    """uint8 takes such steps rarely and in larger portions, with the right mean."""
    grads = jnp.full(2**20, 1e-13)
    narrow, wide = (adamaxw.adamax(1.0, moment_dtype=name) for name in ("uint8", None))
    params = jnp.zeros_like(grads)
    updates, expected = (np.asarray(_updates(opt, params, [grads] * 50)) for opt in (narrow, wide))
    size = np.max(np.abs(updates))
    assert np.mean(updates != 0) < 0.2
    assert size > 5 * np.abs(expected[0])
    np.testing.assert_allclose(updates.mean(), expected[0], rtol=0.05)


def test_a_first_moment_beyond_its_range():
    """Where the norm forgets first, m is clipped in the state to 1.25 of it."""
    opt = adamaxw.adamax(1e-3, b1=0.9, b2=0.5, moment_dtype="uint8")
    wide = adamaxw.adamax(1e-3, b1=0.9, b2=0.5)
    ratios = []
    for each in (opt, wide):
        _, state = _run(each, jnp.ones(3), [*[1.0] * 10, *[0.0] * 5])
        moments = adamaxw.moments.unpack(state)
        ratios.append(moments.mu / moments.nu)
    np.testing.assert_allclose(ratios[0], 1.25, rtol=1e-6)
    assert np.all(ratios[1] > 5)


def _updates(opt, params, gradients):
    """Those of the last of several steps."""
    state, step = opt.init(params), jax.jit(opt.update)
    updates = None
    for grads in gradients:
        updates, state = step(grads, state, params)
    return updates
