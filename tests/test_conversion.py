"""Going on with another optimizer or format: the states of Optax's and ours, in any wrapper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, assert_equal_but_for_last_bits, types_of
from flax import nnx
from gradients import KINDS, gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import x64

import adamaxw
from adamaxw.moments import Moments, convert, pack, unpack

# The schedules and wrappers of Optax promote.
pytestmark = pytest.mark.usefixtures("standard_promotion", "compile_fast")

_PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3), "s": jnp.ones(())}
_MASK = {"w": True, "b": False, "s": False}
_SCHEDULE = optax.linear_schedule(0.05, 0.001, 40)
_HYPER = {"learning_rate": _SCHEDULE, "weight_decay": 0.3}
_NAMES = (None, "bfloat16", "uint8")


def _labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)


def _parts(*before):
    """An optimizer made of the parts of optax.adamaxw, one after another."""
    return optax.chain(
        *before,
        optax.scale_by_adamax(),
        optax.add_decayed_weights(0.3, mask=_MASK),
        optax.scale_by_schedule(_SCHEDULE),
        optax.scale(-1),
        optax.clip(1e6),
    )


def _whole(*before):
    opt = adamaxw.adamaxw(_SCHEDULE, weight_decay=0.3, mask=_MASK)
    return optax.chain(*before, opt, optax.clip(1e6))


def _both(wrap, name="adamaxw"):
    """An optimizer of Optax and the same of ours, each in the wrapper."""
    return wrap(getattr(optax, name)), wrap(getattr(adamaxw, name))


_DECAY_SCHEDULE = {"weight_decay": optax.linear_schedule(0.0, 0.3, 20)}
_CASES = {
    "constants": _both(lambda make: make(0.01)),
    "schedule": _both(lambda make: make(**_HYPER)),
    "adamax": _both(lambda make: make(0.01), "adamax"),
    "adamax, schedule": _both(lambda make: make(_SCHEDULE), "adamax"),
    "mask": _both(lambda make: make(**_HYPER, mask=_MASK)),
    "decay schedule": _both(lambda make: make(0.01, **_DECAY_SCHEDULE)),
    "masked decay schedule": _both(lambda make: make(_SCHEDULE, mask=_MASK, **_DECAY_SCHEDULE)),
    "chain": _both(
        lambda make: optax.chain(optax.clip_by_global_norm(0.5), make(**_HYPER), optax.scale(0.5))
    ),
    "nested chains": _both(
        lambda make: optax.chain(optax.trace(0.5), optax.chain(optax.chain(make(**_HYPER))))
    ),
    "named chain": _both(lambda make: optax.named_chain(("clip", optax.clip(1)), ("x", make(0.1)))),
    "masked": _both(lambda make: optax.masked(make(**_HYPER), _MASK)),
    "partition": _both(
        lambda make: optax.partition(
            {"matrix": make(**_HYPER), "rest": make(0.1, weight_decay=0.0)}, _labels
        )
    ),
    "partition beside adam": _both(
        lambda make: optax.partition({"matrix": make(**_HYPER), "rest": optax.adam(0.1)}, _labels)
    ),
    # 25 steps: stopped in the middle of an accumulation.
    "MultiSteps": _both(lambda make: optax.MultiSteps(make(**_HYPER), every_k_schedule=3)),
    "apply_if_finite": _both(lambda make: optax.apply_if_finite(make(**_HYPER), 2)),
    "inject_hyperparams": _both(
        lambda make: optax.inject_hyperparams(make)(learning_rate=0.01, weight_decay=0.3)
    ),
    "inject_hyperparams, scheduled": _both(
        lambda make: optax.chain(
            optax.clip(0.5),
            optax.inject_hyperparams(make, static_args="mask")(
                **_HYPER, b1=optax.linear_schedule(0.8, 0.95, 40), mask=_MASK
            ),
        )
    ),
    "flatten": _both(lambda make: optax.flatten(make(**_HYPER))),
    "parts": (_parts(), _whole()),
    "parts behind others": (
        _parts(optax.clip(1.0), optax.trace(0.5)),
        _whole(optax.clip(1.0), optax.trace(0.5)),
    ),
}


@functools.cache
def _case(name):
    """The two optimizers of a case, and the loops that train with each."""
    opts = _CASES[name]
    if "decay schedule" in name:
        state = opts[0].init(_PARAMS)
        _, state = opts[0].update(_PARAMS, state, _PARAMS)
        if len({int(x) for x in _counts(state)}) > 1:
            pytest.skip("before 0.2.7 optax.add_decayed_weights never counts its schedule on")
    return opts, tuple(map(_loop, opts))


def _counts(state):
    return [x for path, x in optax.tree.get_all_with_path(state, "count")]


def _loop(opt):
    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry, g: jax.lax.scan(step, carry, g)[0])


@functools.cache
def _gradients():
    return {
        name: jnp.asarray(gradients("normal", 50, p.shape, seed))
        for seed, (name, p) in enumerate(_PARAMS.items())
    }


def _halves():
    grads = _gradients()
    return jax.tree.map(lambda g: g[:25], grads), jax.tree.map(lambda g: g[25:], grads)


def _assert_close(got, expected):
    # Two programs that round the same sums each its own way: the tolerance of test_parity.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("source", [0, 1], ids=["from optax", "to optax"])
@pytest.mark.parametrize("name", _CASES)
def test_training_goes_on(name, source):
    """Stopped and converted after 25 of 50 steps, it ends where the run that never stopped does."""
    opts, loops = _case(name)
    first, second = _halves()
    params, state = loops[source]((_PARAMS, opts[source].init(_PARAMS)), first)
    expected, expected_state = loops[source]((params, state), second)
    like = opts[1 - source].init(params)
    converted = convert(state, like)
    assert types_of(converted) == types_of(jax.tree.map(jnp.asarray, like))
    got, got_state = loops[1 - source]((params, converted), second)
    _assert_close(got, expected)
    back = convert(got_state, opts[source].init(params))
    assert jax.tree.structure(back) == jax.tree.structure(expected_state)
    _assert_close(back, expected_state)


@pytest.mark.parametrize("name", _CASES)
def test_there_and_back(name):
    """Ours to Optax's to ours, and theirs to ours to theirs: bit for bit in float32."""
    opts, loops = _case(name)
    for i in range(2):
        params, state = loops[i]((_PARAMS, opts[i].init(_PARAMS)), _halves()[0])
        there = convert(state, opts[1 - i].init(params))
        back = convert(there, opts[i].init(params))
        assert jax.tree.structure(back) == jax.tree.structure(state)
        assert_equal(back, state)


@pytest.mark.parametrize("name", _CASES)
def test_moments_of_optax_are_taken_bit_for_bit(name):
    """No rounding on the way into float32: mu and nu are those of Optax."""
    opts, loops = _case(name)
    params, state = loops[0]((_PARAMS, opts[0].init(_PARAMS)), _halves()[0])
    new = convert(state, opts[1].init(params))
    for part in ("mu", "nu"):
        values = [jax.tree.leaves(x) for _, x in optax.tree.get_all_with_path(new, part)]
        old = [jax.tree.leaves(x) for _, x in optax.tree.get_all_with_path(state, part)]
        assert_equal(values, old)


@functools.cache
def _trained(name, rounding="nearest", dtype="float32", eps=1e-6):
    params = jax.tree.map(lambda p: p.astype(dtype), _PARAMS)
    opt = adamaxw.adamaxw(0.01, eps=eps, moment_dtype=name, param_rounding=rounding)
    return opt, *_loop(opt)((params, opt.init(params)), _halves()[0])


@pytest.mark.parametrize("goal", _NAMES)
@pytest.mark.parametrize("name", _NAMES)
def test_between_formats(name, goal):
    """As pack of unpack, with the eps of the optimizer that goes on; the same format as it is."""
    _, params, state = _trained(name)
    opt = adamaxw.adamaxw(0.01, eps=1e-5, moment_dtype=goal)
    new = convert(state, opt.init(params))
    assert types_of(new) == types_of(opt.init(params))
    assert_equal(new, state if name == goal else pack(unpack(state), goal, np.float32(1e-5)))
    updates, _ = opt.update(params, new, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("goal", _NAMES)
def test_between_formats_in_wrappers(goal):
    """What a MultiSteps has accumulated and what a chain keeps is still there."""

    def wrapped(name):
        return optax.MultiSteps(
            optax.chain(optax.trace(0.9), adamaxw.adamaxw(0.01, moment_dtype=name)), 3
        )

    params, state = _loop(wrapped(None))((_PARAMS, wrapped(None).init(_PARAMS)), _halves()[0])
    like = wrapped(goal).init(params)
    new = convert(state, like)
    assert types_of(new) == types_of(like)
    assert new.mini_step == 1
    assert_equal(new.acc_grads, state.acc_grads)
    assert_equal(new.inner_opt_state[0], state.inner_opt_state[0])
    inner = pack(unpack(state.inner_opt_state[1]), goal)
    assert_equal(new.inner_opt_state[1], inner)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_16_bits_of_optax(name, dtype):
    """Moments that Optax keeps in the dtype of params are widened, and train on."""
    params = jax.tree.map(lambda p: p.astype(dtype), _PARAMS)
    grads = jax.tree.map(lambda g: g.astype(dtype), _halves()[0])
    old, new = optax.adamaxw(0.01, eps=1e-4), adamaxw.adamaxw(0.01, eps=1e-4, moment_dtype=name)
    params, state = _loop(old)((params, old.init(params)), grads)
    got = convert(state, new.init(params))
    moments = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in state[0][1:]]
    assert_equal(got, pack(Moments(state[0].count, *moments), name, np.float32(1e-4)))
    back = convert(convert(state, adamaxw.adamax(0.1).init(params)), old.init(params))
    assert_equal(back, state)


def test_complex_and_integer_and_64_bits():
    """Optax's norm of complex params is complex; integers stay; float64 narrows to what is like."""
    params = {"c": jnp.ones(2, jnp.complex64), "i": jnp.arange(3)}
    state: Any = optax.adamaxw(0.1).init(params)
    spun = jnp.array([1 + 1j, 2.0], jnp.complex64)
    norm = jnp.array([2.0, 2.5], jnp.complex64)
    core = state[0]._replace(mu={**state[0].mu, "c": spun}, nu={**state[0].nu, "c": norm})
    state = (core, *state[1:])
    opt = adamaxw.adamaxw(0.1)
    got = convert(state, opt.init(params))
    assert types_of(got) == types_of(opt.init(params))
    assert_equal(got.nu["c"], norm.real)
    assert_equal(convert(got, state), state)
    with x64():
        params = jnp.ones(3, jnp.float64)
        _, wide = opt.update(params, opt.init(params), params)
        narrow = opt.init(params.astype(jnp.float32))
        got = convert(wide, narrow)
        assert types_of(got) == types_of(narrow)
        np.testing.assert_allclose(got.mu, wide.mu, rtol=1e-7)
        assert types_of(convert(narrow, wide)) == types_of(wide)


@pytest.mark.parametrize("goal", _NAMES)
def test_residuals(goal):
    """The low bits of master weights are kept in any format; where there were none, zeros begin."""
    _, params, state = _trained(None, "exact", "bfloat16")
    opt = adamaxw.adamaxw(0.01, moment_dtype=goal, param_rounding="exact")
    assert any(r.any() for r in jax.tree.leaves(state.residual))
    assert_equal(convert(state, opt.init(params)).residual, state.residual)
    _, params, state = _trained("uint8", "nearest", "bfloat16")
    like = opt.init(params)
    new = convert(state, like)
    assert types_of(new) == types_of(like)
    assert not any(r.any() for r in jax.tree.leaves(new.residual))


@pytest.mark.parametrize("make", [optax.adamaxw, adamaxw.adamaxw])
def test_low_bits_are_never_dropped_in_silence(make):
    """A goal without residual is refused until the caller gives the bits up."""
    _, params, state = _trained(None, "exact", "bfloat16")
    like = make(0.01).init(params)
    with pytest.raises(ValueError, match=r"state.residual.*master_params.*_replace"):
        convert(state, like)
    assert types_of(convert(state._replace(residual=None), like)) == types_of(like)


def test_some_leaves_with_a_residual():
    """Params of which some are float32 have residuals beside the others alone."""
    params = {"w": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones(2), "n": None}
    opts = [adamaxw.adamaxw(0.1, moment_dtype=m, param_rounding="exact") for m in (None, "uint8")]
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = opts[0].update(grads, opts[0].init(params), params)
    new = convert(state, opts[1].init(params))
    assert types_of(new) == types_of(opts[1].init(params))
    assert_equal(new.residual, state.residual)
    old = optax.adamaxw(0.1).init(params)
    assert types_of(convert(old, opts[1].init(params))) == types_of(opts[1].init(params))


@pytest.mark.parametrize("goal", _NAMES)
def test_under_jit_and_eval_shape(goal):
    """A compiled conversion, whose `like` takes no memory, gives the same; so do the types."""
    old = optax.adamaxw(0.01)
    params, state = _loop(old)((_PARAMS, old.init(_PARAMS)), _halves()[0])
    opt = adamaxw.adamaxw(0.01, eps=1e-6, moment_dtype=goal)
    expected = convert(state, opt.init(params))
    new = jax.jit(lambda state, params: convert(state, opt.init(params)))(state, params)
    assert_equal_but_for_last_bits(new, expected)
    types = jax.eval_shape(lambda state: convert(state, opt.init(params)), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), types) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    shapes = jax.eval_shape(opt.init, params)
    if goal is not None:
        with pytest.raises(TypeError, match=r"like\.nu_scale must be an array, which says eps"):
            convert(state, shapes)
        shapes = shapes._replace(nu_scale=opt.init(params).nu_scale)
    assert_equal(convert(state, shapes), expected)
    assert_equal(convert(expected, shapes), expected)


@pytest.mark.parametrize("goal", _NAMES)
def test_numpy_arrays_and_a_batch_of_states(goal):
    """A state as a checkpoint may give it, and states under jax.vmap, come out like the others."""
    opts, loops = _case("schedule")
    params, state = loops[0]((_PARAMS, opts[0].init(_PARAMS)), _halves()[0])
    opt = adamaxw.adamaxw(_SCHEDULE, moment_dtype=goal)
    like, expected = opt.init(params), convert(state, opt.init(params))
    restored = jax.tree.map(np.asarray, state)
    restored = (restored[0]._replace(count=25), *restored[1:])
    assert_equal(convert(restored, like), expected)

    def twice(tree):
        return jax.tree.map(lambda x: jnp.stack([x, x]), tree)

    assert_equal_but_for_last_bits(
        jax.vmap(lambda s: convert(s, like))(twice(state)), twice(expected)
    )


@pytest.mark.parametrize("source", [0, 1])
def test_the_state_may_be_donated(source):
    """No buffer is in it twice."""
    opts, loops = _case("schedule")
    params, state = loops[source]((_PARAMS, opts[source].init(_PARAMS)), _halves()[0])
    new = convert(state, opts[1 - source].init(params))
    step = jax.jit(opts[1 - source].update, donate_argnums=1)
    step(params, new, params)
    assert jax.tree.leaves(new)[1].is_deleted()


@pytest.mark.parametrize("goal", _NAMES)
@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(goal, axis):
    """New moments lie where the old ones lay, whatever `like` lies on."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis, axis))
    params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("x", "y")))
    old = optax.adamaxw(0.01)
    _, state = jax.jit(old.update)(params, old.init(params), params)
    opt = adamaxw.adamaxw(0.01, moment_dtype=goal, param_rounding="exact")
    for like in (opt.init(params), opt.init(jax.device_put(np.ones((8, 4)), jax.devices()[5]))):
        new = convert(state, like)
        assert new.mu.sharding == new.nu.sharding == params.sharding
        updates, _ = opt.update(params, new, params)
        assert updates.sharding.is_equivalent_to(params.sharding, 2)
    back = convert(new, old.init(np.ones((8, 4), np.float32)))
    assert back[0].mu.sharding == back[0].nu.sharding == params.sharding


_ADAMS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3, mask=_MASK),
    "nadamw": optax.nadamw(1e-3),
    "scheduled": optax.adamw(_SCHEDULE),
    "lamb": optax.lamb(1e-3),
    "b2=0.95": optax.adamw(1e-3, b2=0.95),
}


# By the number of steps: as the average comes to be that of all squares, it grows.
_ORDINARY = {1: (1e-6, 1e-3, 1.0, 30.0), 30: (1e-6, 1e-2, 0.3), 1000: (1e-6, 1e-2, 0.1)}


@pytest.mark.parametrize("steps", _ORDINARY)
@pytest.mark.parametrize("name", _ADAMS)
def test_adam_is_refused(name, steps):
    """The type is the same, but averages of squares of ordinary gradients are no norms."""
    opt = _ADAMS[name]
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64), "s": jnp.ones(())}
    grads = {k: jnp.asarray(gradients("normal", steps, p.shape)) for k, p in params.items()}
    like = optax.chain(adamaxw.adamaxw(1e-3)).init(params)
    train = _loop(opt)
    for scale in _ORDINARY[steps]:
        _, state = train((params, opt.init(params)), jax.tree.map(lambda g, s=scale: s * g, grads))
        with pytest.raises(ValueError, match=r"state\[0\] is the state of another .*in nu\["):
            convert((state,), like)


def test_adam_without_gradients_somewhere_is_refused():
    """However large the others are: an element that never had a gradient has 0, not eps."""
    opt = optax.adam(1e-3)
    params = jnp.ones(3)
    grads = 1e4 * jnp.array([1.0, 0.0, -1.0])
    _, state = opt.update(grads, opt.init(params), params)
    with pytest.raises(ValueError, match="beside others that are not"):
        convert(state, adamaxw.adamax(1e-3).init(params))


def test_what_cannot_be_told():
    """Adam's squares of gradients of about 1 or more in every element are as large as norms.

    In the first steps the gradients must be larger, 50 or more. Where values are traced, nothing
    can be told.
    """
    opt, like = optax.adam(1e-3), adamaxw.adamax(1e-3).init(jnp.ones(3))
    _, large = _loop(opt)((jnp.ones(3), opt.init(jnp.ones(3))), jnp.ones((1000, 3)))
    assert convert(large, like).count == 1000
    _, small = opt.update(jnp.full(3, 1e-4), opt.init(jnp.ones(3)))
    assert jax.jit(convert)(small, like).count == 1


@pytest.mark.parametrize("rates", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adamax_is_not_taken_for_adam(dtype, rates):
    """Gradients of every kind in every dtype, NaN too, at b2 down to where 1-b2 = (1-b1)/2."""
    limit = 6e4 if dtype == "float16" else 1e38
    grads = {kind: gradients(kind, 300, (512,)).clip(-limit, limit) for kind in KINDS}
    # The largest ratio that there is: gradients that fall as fast as the norm, of one sign.
    grads["falling"] = 1e3 * rates[1] ** np.arange(300.0)
    grads = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
    params = jax.tree.map(lambda g: g[0], grads)
    opt = optax.adamax(1e-3, *rates)
    _, state = _loop(opt)((params, opt.init(params)), grads)
    assert convert(state, adamaxw.adamax(1e-3).init(params)).count == 300


def test_a_norm_that_forgets_before_the_first_moment():
    """With b2 far below b1 a norm looks like Adam's; the error names the way, which is right."""
    opt, params = optax.adamax(1e-3, b1=0.9, b2=0.1), jnp.ones(3)
    grads = jnp.array([1.0, 1e-3, 1e-3])
    state = opt.init(params)
    for g in grads:
        _, state = opt.update(jnp.full(3, g), state)
    like = adamaxw.adamax(1e-3, b2=0.1).init(params)
    with pytest.raises(ValueError, match=r"pack\(Moments\(count, mu, nu\)\) in place of state"):
        convert(state, like)
    core = state[0]
    new = convert(pack(Moments(core.count, core.mu, core.nu)), like)
    assert_equal(new.nu, core.nu)
    assert_equal(convert(Moments(core.count, core.mu, core.nu), like), new)


def test_a_leaf_without_gradients_may_go_to_optax_and_back():
    """All zeros are no sign of Adam: a leaf whose gradients were None has them in ours."""
    params = {"w": jnp.ones(3), "frozen": jnp.ones(2)}
    opt = adamaxw.adamax(1e-3)
    _, state = opt.update({"w": jnp.ones(3), "frozen": None}, opt.init(params))
    there = convert(state, optax.adamax(1e-3).init(params))
    assert_equal(convert(there, opt.init(params)), state)


def test_not_finite_stays_visible():
    """NaN and inf are moved as they are, and seen in what comes of them."""
    opt, params = optax.adamaxw(1e-3), jnp.ones(3)
    _, state = opt.update(jnp.array([1.0, jnp.nan, jnp.inf]), opt.init(params), params)
    for name in _NAMES:
        new = convert(state, adamaxw.adamaxw(1e-3, moment_dtype=name).init(params))
        updates, _ = adamaxw.adamaxw(1e-3, moment_dtype=name).update(params, new, params)
        np.testing.assert_array_equal(np.isnan(updates), [False, True, True])


_OTHERS = {
    "amsgrad": (optax.amsgrad(0.1), "a tuple of ScaleByAmsgradState, EmptyState"),
    "adabelief": (optax.adabelief(0.1), "a tuple of ScaleByBeliefState"),
    "lion": (optax.lion(0.1), "a tuple of ScaleByLionState"),
    "sgd": (optax.sgd(0.1), "a tuple of EmptyState, EmptyState"),
    "adam with more": (
        optax.chain(optax.scale_by_adam(), optax.trace(0.9)),
        "a tuple of ScaleByAdamState, TraceState",
    ),
    "identity": (optax.identity(), "a EmptyState"),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_other_optimizers_are_refused_by_name(name):
    """In either direction, with the place."""
    opt, described = _OTHERS[name]
    ours, theirs = adamaxw.adamaxw(0.1).init(_PARAMS), opt.init(_PARAMS)
    match = rf"no state of adamaxw or adamax at state\['x'\], but {described}"
    with pytest.raises(TypeError, match=match):
        convert({"x": theirs}, {"x": ours})
    with pytest.raises(TypeError, match=rf"at like\['x'\], but {described}"):
        convert({"x": ours}, {"x": theirs})


def _like(**params):
    return optax.chain(optax.clip(1.0), adamaxw.adamaxw(0.1)).init({**_PARAMS, **params})


def _narrow_like(**changes):
    return (
        optax.EmptyState(),
        adamaxw.adamaxw(0.1, moment_dtype="uint8").init(_PARAMS)._replace(**changes),
    )


_SCHEDULED = optax.chain(optax.clip(1.0), optax.adamaxw(_SCHEDULE))
_STATE: Any = _SCHEDULED.init(_PARAMS)


def _core(**changes):
    return (_STATE[0], (_STATE[1][0]._replace(**changes), *_STATE[1][1:]))


@pytest.mark.parametrize(
    ("state", "like", "error", "match"),
    [
        (_STATE, _like(v=jnp.ones(2)), ValueError, r"state\[1\]\.mu and like\[1\]\.mu differ"),
        (_STATE, _like(b=jnp.ones(4)), ValueError, r"state\[1\]\.mu\['b'\].*\(3,\).*\(4,\)"),
        (
            _STATE,
            _like(b=jnp.ones(3, jnp.complex64)),
            TypeError,
            r"mu\['b'\] is of a parameter that is real, and like\[1\].* of one that is compl",
        ),
        (
            _STATE,
            _like(b=jnp.ones(3, jnp.int32)),
            TypeError,
            r"mu\['b'\] .* of one that is int32",
        ),
        (
            _STATE[1][:2],
            _like(),
            ValueError,
            r"state\[0\] and like\[0\] differ in structure: a Scal",
        ),
        (_STATE[1][1:], _like(), TypeError, r"at state\[1\], but a ScaleByScheduleState"),
        (_STATE, _like()[1], TypeError, "at state, but a tuple of EmptyState, tuple"),
        (
            {"a": _STATE},
            {"b": _like()},
            ValueError,
            "differ in structure: a dict of 'a' and a dict of 'b'",
        ),
        ((None, _STATE[1]), _like(), ValueError, r"state\[0\] and like\[0\]"),
        (_core(count=jnp.float32(0)), _like(), TypeError, r"count must be an integer, got float32"),
        (
            _core(count=jnp.int32(7)),
            _like(),
            ValueError,
            r"state\[1\] has done 7 updates, but its schedules stand at \[0\]",
        ),
        (
            _core(mu=jax.tree.map(lambda x: x.astype(jnp.int32), _STATE[1][0].mu)),
            _like(),
            TypeError,
            r"state\.mu\['b'\] and .* are no moments of any format.*int32",
        ),
        (_core(count=jnp.zeros(2, jnp.int32)), _like(), TypeError, r"int32 of shape \(2,\)"),
        (_STATE, _narrow_like(mu=_PARAMS), TypeError, r"like\[1\] is no state that init has made"),
        (_STATE, _narrow_like(nu_scale=None), TypeError, r"like\[1\] is no state that init"),
        (_STATE, _narrow_like(nu_scale=jnp.float32(0)), ValueError, r"eps must satisfy"),
        (
            _core(nu={**_STATE[1][0].nu, "b": "abc"}),
            _like(),
            TypeError,
            r"state\[1\]\.nu\['b'\] must be an array, got 'abc'",
        ),
        (
            _core(mu={**_STATE[1][0].mu, "b": None}),
            (_like()[0], _like()[1]._replace(mu={**_like()[1].mu, "b": None})),
            ValueError,
            r"state\[1\]\.mu and state\[1\]\.nu differ in structure",
        ),
        (
            jax.eval_shape(_SCHEDULED.init, _PARAMS),
            _like(),
            TypeError,
            r"state\[1\]\[0\]\.count must be an array, got ShapeDtypeStruct",
        ),
        ({"x": jnp.ones(2)}, {"x": jnp.ones(3)}, TypeError, r"state\['x'\] is no moment"),
        ({"x": 0.5}, {"x": jnp.int32(3)}, TypeError, r"it is 0\.5 where like\['x'\] is int32"),
    ],
)
def test_what_does_not_fit_is_refused(state, like, error, match):
    """With the path, and what is in either state."""
    with pytest.raises(error, match=match):
        convert(state, like)


def test_hyperparameters_rounded_by_optax_are_not_taken_over():
    """On bfloat16 params optax.inject_hyperparams has made b2 = 1: it is not carried on."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), _PARAMS)
    state = optax.inject_hyperparams(optax.adamaxw)(0.01).init(params)
    opt = optax.inject_hyperparams(adamaxw.adamaxw, hyperparam_dtype=jnp.float32)(0.01)
    like = opt.init(params)
    with pytest.raises(TypeError, match=r"state.hyperparams\['b1'\].*bfloat16.*float32.*replace"):
        convert(state, like)
    state = state._replace(hyperparams=like.hyperparams)
    assert types_of(convert(state, like)) == types_of(like)


def test_a_hyperparameter_set_by_hand_is_kept():
    """A Python number takes the dtype of what stands in its place."""
    state = optax.inject_hyperparams(optax.adamaxw)(0.01).init(_PARAMS)
    state.hyperparams["learning_rate"] = 5e-4
    like = optax.inject_hyperparams(adamaxw.adamaxw)(0.01).init(_PARAMS)
    new = convert(state, like)
    assert types_of(new) == types_of(like)
    assert new.hyperparams["learning_rate"] == np.float32(5e-4)


def test_float16_of_optax_cannot_hold_eps():
    """Its norms of 1e-8 would be 0, and its steps NaN: refused, with the path."""
    params = jnp.ones(2, jnp.float16)
    opt = adamaxw.adamaxw(0.1)
    _, state = opt.update(jnp.array([1.0, 0.0], jnp.float16), opt.init(params), params)
    like = optax.adamaxw(0.1).init(params)
    with pytest.raises(ValueError, match=r"like\[0\]\.nu is float16, which cannot hold"):
        convert(state, like)
    large = state._replace(mu=state.mu + 1e5, nu=state.nu + 1e5)
    with pytest.raises(ValueError, match=r"like\[0\]\.mu is float16, which cannot hold"):
        convert(large, like)
    fine = state._replace(nu=state.nu + 1.0)
    assert types_of(convert(fine, like)) == types_of(like)


@pytest.mark.parametrize("goal", _NAMES)
def test_moments_go_where_there_is_one_place(goal):
    """Moments of other origin, in a chain; everything else is that of like."""
    _, params, state = _trained(None)
    opt = optax.chain(optax.add_decayed_weights(0.1), adamaxw.adamax(0.1, moment_dtype=goal))
    like = opt.init(params)
    new = convert(unpack(state), like)
    assert types_of(new) == types_of(like)
    assert_equal(new[1], pack(unpack(state), goal))
    theirs = optax.adamaxw(_SCHEDULE).init(params)
    assert_equal(convert(unpack(state), theirs), convert(state, theirs))


@pytest.mark.parametrize(("opt", "places"), [(optax.sgd(0.1), 0), (_CASES["partition"][1], 2)])
def test_moments_need_one_place(opt, places):
    """None or several are refused."""
    with pytest.raises(ValueError, match=f"of one adamaxw or adamax .* got {places}"):
        convert(Moments(1, _PARAMS, _PARAMS), opt.init(_PARAMS))


def test_no_leaf_that_trains():
    """A tree without leaves, or with integers alone, has no format."""
    for params in ({}, {"i": jnp.arange(3)}):
        old = optax.adamaxw(0.1).init(params)
        for name in _NAMES:
            like = adamaxw.adamaxw(0.1, moment_dtype=name).init(params)
            assert types_of(convert(old, like)) == types_of(like)
            assert types_of(convert(like, old)) == types_of(old)


@pytest.mark.parametrize("name", _NAMES)
def test_in_flax_nnx(name):
    """The state of an nnx.Optimizer, whose arrays lie in Variables, goes from one to another."""
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def train(optimizer, steps):
        for x in gradients("normal", steps, (4, 3), seed=steps):
            grads = nnx.grad(lambda model, x=x: (model(x) ** 2).mean())(model)
            optimizer.update(model, grads)

    old = nnx.Optimizer(model, optax.adamaxw(_SCHEDULE), wrt=nnx.Param)
    train(old, 5)
    new = nnx.Optimizer(model, adamaxw.adamaxw(_SCHEDULE, moment_dtype=name), wrt=nnx.Param)
    converted = convert(old.opt_state, new.opt_state)
    assert jax.tree.structure(converted) == jax.tree.structure(new.opt_state)
    if name is None:
        grads = nnx.state(model, nnx.Param)
        moments = Moments(5, grads, jax.tree.map(jnp.abs, grads))
        converted_moments = convert(moments, new.opt_state)
        assert jax.tree.structure(converted_moments) == jax.tree.structure(new.opt_state)
    back = convert(convert(old.opt_state, new.opt_state), old.opt_state)
    assert jax.tree.structure(back) == jax.tree.structure(old.opt_state)
    new.opt_state = nnx.data(converted)
    train(new, 2)
    assert new.opt_state.count[...] == 7


@pytest.mark.parametrize("name", _NAMES)
def test_leaves_on_several_devices(name):
    """Each stays where it is; what they have in common is computed on the host."""
    devices = jax.devices()
    params = {"a": jax.device_put(jnp.ones(3), devices[1]), "b": jax.device_put(1.0, devices[2])}
    old, new = adamaxw.adamaxw(0.1), adamaxw.adamaxw(0.1, moment_dtype=name)
    _, state = old.update(params, old.init(params), params)
    got = convert(state, new.init(params))
    assert [got.nu[key].devices() for key in params] == [{devices[1]}, {devices[2]}]
    together = jax.tree.map(np.asarray, state)
    assert_equal(jax.tree.map(np.asarray, got), convert(together, new.init(_host(params))))
    new.update(params, got, params)


def _host(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize("wrap", [lambda state: list(state), lambda state: {"0": state[0]}])
def test_checkpoints_that_came_back_as_plain_containers(wrap):
    """The error says with what structure to restore them."""
    state = wrap(optax.adamaxw(0.1).init(_PARAMS))
    for opt in (adamaxw.adamaxw(0.1), optax.chain(optax.clip(1.0), adamaxw.adamaxw(0.1))):
        with pytest.raises((TypeError, ValueError), match=r"jax\.eval_shape\(optimizer\.init"):
            convert(state, opt.init(_PARAMS))


@pytest.mark.parametrize("count", [-1, 2**31, 2**70, np.int64(2**40)])
def test_a_count_that_none_is(count):
    """An int32 that is not negative."""
    match = f"count must satisfy 0 <= count < 2\\*\\*31, got {count}"
    with pytest.raises(ValueError, match=match):
        pack(Moments(count, jnp.ones(2), jnp.ones(2)))
    with pytest.raises(ValueError, match=rf"state\[1\]\.{match}"):
        convert(_core(count=count), _like())
