"""Resuming with another optimizer or format: the states of Optax's and ours, in any wrapper."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MATRIX, WRAPPERS, make_params
from cases import MOMENTS as _NAMES
from equality import assert_equal, assert_equal_but_for_last_bits, types_of
from flax import nnx
from gradients import KINDS, gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import x64
from pure import as_pure

import adamaxw
from adamaxw.moments import Moments, convert, master_params, pack, unpack

# The schedules and wrappers of Optax promote.
pytestmark = pytest.mark.usefixtures("standard_promotion", "compile_fast")

PARAMS, SCHEDULE = make_params(), optax.linear_schedule(0.05, 0.001, 40)
_GRADIENTS = {
    name: jnp.asarray(gradients("normal", 50, p.shape, seed))
    for seed, (name, p) in enumerate(PARAMS.items())
}
_FIRST, _SECOND = ({k: g[s] for k, g in _GRADIENTS.items()} for s in (slice(25), slice(25, 50)))


def _maker(source, **options):
    """`adamaxw` of Optax or of this package, with the signature that inject_hyperparams reads."""

    def make(learning_rate, b1=0.9, weight_decay=1e-4, mask=None):
        args = {"b1": b1, "weight_decay": weight_decay, "mask": mask, **options}
        return source.adamaxw(lambda count: learning_rate * 0.97**count, **args)

    return make


def _parts(*before):
    """The parts of optax.adamaxw in one chain, and ours in their place."""
    decay = optax.add_decayed_weights(0.3, mask=MATRIX)
    theirs = optax.scale_by_adamax(), decay, optax.scale_by_schedule(SCHEDULE), optax.scale(-1)
    ours = adamaxw.adamaxw(SCHEDULE, weight_decay=0.3, mask=MATRIX)
    return [optax.chain(*before, *middle, optax.clip(1e6)) for middle in (theirs, (ours,))]


_BOTH = (optax, adamaxw)
_DECAYS = {"weight_decay": optax.linear_schedule(0.0, 0.3, 20), "mask": MATRIX}
_PAIRS = {name: [wrap(_maker(source)) for source in _BOTH] for name, wrap in WRAPPERS.items()}
del _PAIRS["reduce_on_plateau"]  # which needs the value of a loss
_PAIRS |= {
    "constants": [source.adamaxw(0.01) for source in _BOTH],
    "decay schedule": [source.adamaxw(SCHEDULE, **_DECAYS) for source in _BOTH],
    "adamax": [source.adamax(SCHEDULE) for source in _BOTH],
    "parts": _parts(),
    "parts behind others": _parts(optax.clip(1.0), optax.trace(0.5)),
}


def _loop(opt):
    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda carry, g: jax.lax.scan(step, carry, g)[0])


_pair_loops = functools.cache(lambda name: [_loop(opt) for opt in _PAIRS[name]])


@functools.cache
def _trained(source=adamaxw, dtype="float32", **options):
    """Params and state after 25 steps."""
    opt, params = source.adamaxw(0.01, **options), optax.tree.cast(PARAMS, dtype)
    return _loop(opt)((params, opt.init(params)), optax.tree.cast(_FIRST, dtype))


def _all(state, field):
    return [jax.tree.leaves(x) for _, x in optax.tree.get_all_with_path(state, field)]


@pytest.mark.parametrize("source", [0, 1], ids=["from optax", "to optax"])
@pytest.mark.parametrize("name", _PAIRS)
def test_training_goes_on(name, source):
    """Converted after 25 of 50 steps, a run ends as if it had not been; back it is bit for bit."""
    opts, loops = _PAIRS[name], _pair_loops(name)
    # The two programs round differently.
    is_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    params, state = loops[source]((PARAMS, opts[source].init(PARAMS)), _FIRST)
    if name == "decay schedule" and optax.__version__ == "0.2.6":
        pytest.skip("before 0.2.7 optax.add_decayed_weights never counts its schedule on")
    like = opts[1 - source].init(params)
    converted = convert(state, like)
    assert types_of(converted) == types_of(jax.tree.map(jnp.asarray, like))
    for field in ("mu", "nu"):
        assert_equal(_all(converted, field), _all(state, field))
    # No buffer is in it twice, or it could not be donated.
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(converted)]
    assert len(set(pointers)) == len(pointers)
    back = convert(converted, opts[source].init(params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_equal(back, state)

    expected, expected_state = loops[source]((params, state), _SECOND)
    got, got_state = loops[1 - source]((params, converted), _SECOND)
    jax.tree.map(is_close, got, expected)
    jax.tree.map(is_close, convert(got_state, opts[source].init(params)), expected_state)


def _split(state):
    """The states of AdaMax in a tree, and all other leaves."""
    kinds = (adamaxw.AdamaxState, optax.ScaleByAdamState)
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    found = [x for x in nodes if isinstance(x, kinds)]
    return found, [x for x in nodes if not isinstance(x, kinds)]


def _filled(state):
    """A state of the same types, with values everywhere: codes, moments, what is accumulated."""
    rng = np.random.default_rng(0)

    def fill(x):
        is_code = x.dtype in (jnp.int8, jnp.uint8)
        values = rng.integers(1, 127, x.shape) if is_code else rng.uniform(0.5, 1, x.shape)
        return jnp.asarray(values, x.dtype) if x.ndim else x

    return optax.tree.set(jax.tree.map(fill, state), count=jnp.int32(4))


@pytest.mark.parametrize("goal", _NAMES)
@pytest.mark.parametrize("source", [*_NAMES, "optax"])
@pytest.mark.parametrize(
    "wrapper", ["bare", "chain", "MultiSteps", "inject_hyperparams", "masked", "partition"]
)
def test_every_format_in_every_wrapper(wrapper, source, goal):
    """Moments are those of pack and unpack with the new eps; all that is not AdaMax is kept."""
    ours = {} if source == "optax" else {"moment_dtype": source}
    make = _maker(adamaxw if ours else optax, **ours)
    state = _filled(WRAPPERS[wrapper](make).init(PARAMS))
    like = WRAPPERS[wrapper](_maker(adamaxw, moment_dtype=goal, eps=1e-5)).init(PARAMS)
    new = convert(state, like)
    assert types_of(new) == types_of(like)
    (olds, kept), (news, still) = _split(state), _split(new)
    if source != "optax":
        assert_equal(still, kept)
    assert len(olds) == len(news) > 0
    for old, converted in zip(olds, news, strict=True):
        if source == goal or not isinstance(converted, adamaxw.AdamaxState):
            assert_equal(converted, old)
            continue
        moments = unpack(old) if source != "optax" else Moments(old.count, old.mu, old.nu)
        assert_equal(converted, pack(moments, goal, np.float32(1e-5)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_from_16_bits_of_optax(dtype):
    """Moments that Optax keeps in the dtype of params are widened, and go back bit for bit."""
    params, state = _trained(optax, dtype, eps=1e-4)
    ours = convert(state, adamaxw.adamaxw(0.01).init(params))
    assert_equal([ours.mu, ours.nu], optax.tree.cast(list(state[0][1:]), "float32"))
    assert_equal(convert(ours, state), state)
    narrow = adamaxw.adamaxw(0.01, moment_dtype="uint8").init(params)
    assert_equal(convert(state, narrow), pack(unpack(ours), "uint8"))


def test_float16_of_optax_cannot_hold_eps():
    """Its norms of 1e-8 would be 0, and its steps NaN."""
    params, opt = jnp.ones(2, jnp.float16), adamaxw.adamaxw(0.1)
    _, state = opt.update(jnp.array([1.0, 0.0], jnp.float16), opt.init(params), params)
    like = optax.adamaxw(0.1).init(params)
    large = state._replace(mu=state.mu + 1e5, nu=state.nu + 1)
    for field, spoiled in (("nu", state), ("mu", large)):
        with pytest.raises(ValueError, match=rf"like\[0\]\.{field}"):
            convert(spoiled, like)
    assert types_of(convert(state._replace(nu=state.nu + 1.0), like)) == types_of(like)


def test_complex_and_integer_and_64_bits():
    """Optax's norm of complex params is complex; integers stay; float64 narrows to what is like."""
    params = {"c": jnp.ones(2, jnp.complex64), "i": jnp.arange(3)}
    opt, norm = adamaxw.adamaxw(0.1), jnp.array([2.0, 2.5], jnp.complex64)
    state: Any = optax.tree.set(optax.adamaxw(0.1).init(params), nu={**params, "c": norm})
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
    """Low bits are kept in any format, begin as zeros where there were none, and are never lost."""
    params, state = _trained(dtype="bfloat16", moment_dtype="uint8", param_rounding="exact")
    like = adamaxw.adamaxw(0.01, moment_dtype=goal, param_rounding="exact").init(params)
    assert any(r.any() for r in jax.tree.leaves(state.residual))
    assert_equal(convert(state, like).residual, state.residual)
    for opt in (optax.adamaxw(0.01), adamaxw.adamaxw(0.01, moment_dtype=goal)):
        without = opt.init(params)
        with pytest.raises(ValueError, match=r"state\.residual.*master_params"):
            convert(state, without)
        given_up = convert(state._replace(residual=None), without)
        assert types_of(given_up) == types_of(without)
        new = convert(given_up, like)
        assert types_of(new) == types_of(like)
        assert not any(r.any() for r in jax.tree.leaves(new.residual))


def test_under_jit_and_eval_shape():
    """Compiled, to an abstract `like`, of NumPy arrays or a batch: the same state, or its types."""
    params, state = _trained(optax)
    opt = adamaxw.adamaxw(0.01, eps=1e-6, moment_dtype="uint8")
    expected = convert(state, opt.init(params))
    compiled = jax.jit(lambda state, params: convert(state, opt.init(params)))
    assert_equal_but_for_last_bits(compiled(state, params), expected)
    assert types_of(jax.eval_shape(compiled, state, params)) == types_of(expected)
    shapes = jax.eval_shape(opt.init, params)
    with pytest.raises(TypeError, match=r"like\.nu_scale"):
        convert(state, shapes)
    assert_equal(convert(state, shapes._replace(nu_scale=expected.nu_scale)), expected)

    restored: Any = jax.tree.map(np.asarray, state)
    assert_equal(convert((restored[0]._replace(count=25), *restored[1:]), expected), expected)
    states, twice = jax.tree.map(lambda x: jnp.stack([x, x]), (state, expected))
    assert_equal_but_for_last_bits(jax.vmap(lambda s: convert(s, expected))(states), twice)


@pytest.mark.parametrize(
    ("axis", "goal"),
    [(AxisType.Auto, "uint8"), (AxisType.Explicit, "bfloat16"), (AxisType.Explicit, None)],
)
def test_on_a_mesh(axis, goal):
    """Moments stay where the old ones lay, whatever `like` lies on; scalars are everywhere."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis, axis))
    params = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("x", "y")))
    elsewhere, old = jax.device_put(np.ones((8, 4)), jax.devices()[5]), optax.adamaxw(0.01)
    _, state = jax.jit(old.update)(params, old.init(params), params)
    opt = adamaxw.adamaxw(0.01, moment_dtype=goal, param_rounding="exact")
    new = convert(state, opt.init(elsewhere))
    back = convert(new, old.init(elsewhere))[0]
    unpacked = jax.jit(unpack)(new)
    packed = jax.jit(lambda moments: pack(moments, "uint8"))(unpacked)
    for moments in (new, back, unpacked, packed):
        assert moments.mu.sharding.is_equivalent_to(params.sharding, 2)
        assert moments.nu.sharding.is_equivalent_to(params.sharding, 2)
        assert moments.count.sharding.is_fully_replicated
    assert_equal(packed, pack(jax.device_get(unpacked), "uint8"))


def test_leaves_on_several_devices():
    """Each stays where it is; what they have in common is computed on the host."""
    devices = jax.devices()
    params = {"a": jax.device_put(jnp.ones(3), devices[1]), "b": jax.device_put(1.0, devices[2])}
    old, new = adamaxw.adamaxw(0.1), adamaxw.adamaxw(0.1, moment_dtype="uint8")
    _, state = old.update(params, old.init(params), params)
    got = convert(state, new.init(params))
    assert [got.nu[key].devices() for key in params] == [{devices[1]}, {devices[2]}]
    state, like = jax.device_get((state, new.init(params)))
    assert_equal(jax.device_get(got), convert(state, like))
    new.update(params, got, params)


@pytest.mark.parametrize(
    ("steps", "scales"),
    [(1, (1e-6, 30)), (30, (1e-6, 0.3)), pytest.param(1000, (1e-6, 0.1), marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("make", [optax.adamw, optax.nadam, optax.lamb])
def test_adam_is_refused(make, steps, scales):
    """The type is the same, but averages of squares of ordinary gradients are no norms."""
    opt, params = make(SCHEDULE, b2=0.95), {**PARAMS, "w": jnp.ones((64, 64))}
    grads = {k: jnp.asarray(gradients("normal", steps, p.shape)) for k, p in params.items()}
    like, train = optax.chain(adamaxw.adamaxw(1e-3)).init(params), _loop(opt)
    for scale in scales:
        _, state = train((params, opt.init(params)), jax.tree.map(lambda g, s=scale: s * g, grads))
        with pytest.raises(ValueError, match=r"state\[0\] .*nu\["):
            convert((state,), like)


def test_what_looks_like_adam():
    """Norms of 0 beside others, or with b2 far below b1, unless traced or given as Moments."""
    adam, forgetful = optax.adam(1e-3), optax.adamax(1e-3, b1=0.9, b2=0.1)
    like = adamaxw.adamax(1e-3).init(jnp.ones(3))
    for opt, steps in ((adam, [[1e4, 0, -1e4]]), (forgetful, [[1] * 3, [1e-3] * 3, [1e-3] * 3])):
        state: Any = opt.init(jnp.ones(3))
        for g in steps:
            _, state = opt.update(jnp.array(g, jnp.float32), state)
        with pytest.raises(ValueError, match=r"state.*Moments\(count, mu, nu\)"):
            convert(state, like)
        assert jax.jit(convert)(state, like).count == len(steps)
        assert_equal(convert(Moments(*state[0]), like).nu, state[0].nu)
    # A leaf without a gradient is all zeros, which is no sign of Adam.
    params, opt = {"w": jnp.ones(3), "frozen": jnp.ones(2)}, adamaxw.adamax(1e-3)
    _, ours = opt.update({"w": jnp.ones(3), "frozen": None}, opt.init(params))
    assert_equal(convert(convert(ours, adam.init(params)), opt.init(params)), ours)


@pytest.mark.parametrize(
    ("dtype", "rates"),
    [("float32", (0.9, 0.95)), ("bfloat16", (0.0, 0.5)), ("float16", (0.9, 0.95))],
)
def test_adamax_is_not_taken_for_adam(dtype, rates):
    """Gradients of every kind in every dtype, NaN too, at b2 down to where 1-b2 = (1-b1)/2."""
    limit = 6e4 if dtype == "float16" else 1e38
    grads = {kind: gradients(kind, 300, (512,)).clip(-limit, limit) for kind in KINDS}
    # The largest ratio that there is: gradients that fall as fast as the norm, of one sign.
    grads["falling"] = 1e3 * rates[1] ** np.arange(300.0)
    grads = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
    params, opt = jax.tree.map(lambda g: g[0], grads), optax.adamax(1e-3, *rates)
    _, state = _loop(opt)((params, opt.init(params)), grads)
    assert convert(state, adamaxw.adamax(1e-3).init(params)).count == 300


@pytest.mark.parametrize("goal", _NAMES)
def test_moments_go_where_there_is_one_place(goal):
    """Everything else is that of like; none or several places are refused."""
    params, state = _trained()
    moments = unpack(state)
    opt = optax.chain(optax.add_decayed_weights(0.1), adamaxw.adamax(0.1, moment_dtype=goal))
    new = convert(moments, opt.init(params))
    assert types_of(new) == types_of(opt.init(params))
    assert_equal(new[1], pack(moments, goal))
    theirs = optax.adamaxw(SCHEDULE).init(params)
    assert_equal(convert(moments, theirs), convert(state, theirs))
    for other in (optax.sgd(0.1), _PAIRS["partition"][1]):
        with pytest.raises(ValueError, match="like"):
            convert(moments, other.init(params))


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("params", [{}, {"i": jnp.arange(3)}])
def test_no_leaf_that_trains(params, name):
    """A tree without leaves, or with integers alone, has no format."""
    old = optax.adamaxw(0.1).init(params)
    like = adamaxw.adamaxw(0.1, moment_dtype=name).init(params)
    assert types_of(convert(old, like)) == types_of(like)
    assert types_of(convert(like, old)) == types_of(old)


def test_in_flax_nnx():
    """States and params of an nnx.Optimizer hold Variables: converted with, and read without."""
    model = nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    exact = adamaxw.adamaxw(SCHEDULE, moment_dtype="uint8", param_rounding="exact")
    opts = optax.adamaxw(SCHEDULE), exact
    old, new = (nnx.Optimizer(model, opt, wrt=nnx.Param) for opt in opts)
    params = nnx.state(model, nnx.Param)
    nnx.jit(lambda model, optimizer: optimizer.update(model, params))(model, old)
    converted = convert(old.opt_state, new.opt_state)
    moments, masters = unpack(converted), master_params(params, converted)
    assert_equal(moments, unpack(as_pure(converted)))
    assert_equal(masters, master_params(as_pure(params), as_pure(converted)))
    back = convert(converted._replace(residual=None), old.opt_state)
    again = convert(moments, new.opt_state)
    for got, like in ((converted, new), (again, new), (back, old)):
        assert jax.tree.structure(got) == jax.tree.structure(like.opt_state)


def test_hyperparameters_rounded_by_optax_are_not_taken_over():
    """On bfloat16 params optax.inject_hyperparams has made b2 = 1; numbers set by hand are kept."""
    params = optax.tree.cast(PARAMS, "bfloat16")
    state = optax.inject_hyperparams(optax.adamaxw)(0.01).init(params)
    opt = optax.inject_hyperparams(adamaxw.adamaxw, hyperparam_dtype=jnp.float32)(0.01)
    like = opt.init(params)
    with pytest.raises(TypeError, match=r"state.hyperparams\['b1'\]"):
        convert(state, like)
    state = state._replace(hyperparams=like.hyperparams | {"learning_rate": 5e-4})
    new = convert(state, like)
    assert new.hyperparams["learning_rate"] == np.float32(5e-4)


def _like(**params):
    return optax.chain(optax.clip(1.0), adamaxw.adamaxw(0.1)).init({**PARAMS, **params})


_STATE: Any = optax.chain(optax.clip(1.0), optax.adamaxw(SCHEDULE)).init(PARAMS)
_AHEAD = (_STATE[0], (_STATE[1][0]._replace(count=jnp.int32(7)), *_STATE[1][1:]))


@pytest.mark.parametrize(
    ("state", "like", "words"),
    [
        # Structures, shapes and kinds.
        (_STATE, _like(v=jnp.ones(2)), r"state\[1\]\.mu.*like\[1\]\.mu"),
        (_STATE, _like(b=jnp.ones(3)), r"state\[1\]\.mu\['b'\]"),
        (_STATE, _like(b=jnp.ones(4, jnp.complex64)), r"mu\['b'\]"),
        (_STATE, _like(b=jnp.ones(4, jnp.int32)), r"mu\['b'\]"),
        (_STATE[1][:2], _like(), r"state\[0\].*like\[0\]"),
        ({"x": jnp.ones(2)}, {"x": jnp.ones(3)}, r"state\['x'\]"),
        # Other optimizers, containers from a checkpoint, and schedules with other counts.
        ({"x": optax.sgd(0.1).init(PARAMS)}, {"x": _like()[1]}, r"state\['x'\]"),
        ({"x": _like()[1]}, {"x": optax.lion(0.1).init(PARAMS)}, r"like\['x'\]"),
        (list(_STATE), _like(), r"init"),
        ({"0": _STATE[1]}, _like()[1], r"init"),
        (_AHEAD, _like(), r"state\[1\].*count"),
        # Moments under other names, and arrays that are not there.
        (_like()[1]._replace(nu={}), _like()[1], r"state\.mu.*state\.nu"),
        (jax.eval_shape(lambda: _like()[1]), _like()[1], r"state\.count.*array"),
    ],
)
def test_what_does_not_fit_is_refused(state, like, words):
    """With the path, and what is in either state."""
    with pytest.raises((TypeError, ValueError), match=words):
        convert(state, like)


def test_an_abstract_goal_without_leaves_that_train():
    """As where `optax.partition` has a group without parameters: its state stays as it is."""
    make = functools.partial(adamaxw.adamax, 0.1, moment_dtype="uint8")
    opt = optax.partition({"x": make(), "y": make()}, {"w": "x"})
    state = opt.init({"w": jnp.ones(3)})
    assert_equal(convert(state, jax.eval_shape(lambda: state)), state)
