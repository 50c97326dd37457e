"""What is traced and compiled, how often, and what the compiled step holds in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from modes import apply_updates, x64

import adamaxw
from adamaxw import _optimizer, _rule

_FORMATS = (None, "bfloat16", "uint8")


@pytest.fixture
def traces(monkeypatch):
    """Names each trace of the rule; what was traced before is forgotten."""
    jax.clear_caches()
    shapes = []

    def next_step(ratio, *args, **kwargs):
        shapes.append(ratio.shape)
        return original(ratio, *args, **kwargs)

    original = _rule.next_step
    monkeypatch.setattr(_optimizer, "next_step", next_step)
    yield shapes
    jax.clear_caches()


def _tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(7, 11)] * 5 + [(13,)] * 3
    return {f"{i}": jnp.asarray(rng.normal(size=shape), dtype) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("moment_dtype", _FORMATS)
@pytest.mark.parametrize("jit", [True, False])
def test_the_rule_is_traced_once_for_all_leaves_of_a_shape(traces, moment_dtype, jit):
    """Under jit and outside: eight leaves of two shapes are two traces."""
    params = _tree()
    opt = adamaxw.adamaxw(1e-3, moment_dtype=moment_dtype)
    update = jax.jit(opt.update) if jit else opt.update
    _, state = update(params, opt.init(params), params)
    assert sorted(traces) == [(7, 11), (13,)]
    update(params, state, params)
    assert len(traces) == 2


def test_leaves_that_decay_and_others_are_traced_apart(traces):
    """The mask is part of what is compiled; the numbers that a step multiplies with are not."""
    params = _tree()
    mask = {name: int(name) % 2 == 0 for name in params}
    for lr, wd in ((1e-3, 0.1), (1e-2, 0.2), (np.float32(0.1), 0)):
        opt = adamaxw.adamaxw(lr, weight_decay=wd, mask=mask)
        opt.update(params, opt.init(params), params)
        assert len(traces) == 4


def test_injected_hyperparameters_are_traced_once(traces):
    """optax.inject_hyperparams builds the optimizer anew each step, with arrays."""
    params = _tree()
    opt = optax.inject_hyperparams(adamaxw.adamaxw)(1e-3, b1=0.8)
    state = opt.init(params)
    for step in range(3):
        state.hyperparams["b1"] = jnp.float32(0.8 + 0.05 * step)
        _, state = opt.update(params, state, params)
        assert len(traces) == 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_outside_jit_is_as_under_jit(moment_dtype, rounding):
    """Bit for bit, over several steps."""
    params = _tree(jnp.bfloat16)
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding=rounding)

    def train(update):
        p, state = params, opt.init(params)
        for _ in range(3):
            updates, state = update(p, state, p)
            p = apply_updates(p, updates)
        return p, state

    assert_equal(train(opt.update), train(jax.jit(opt.update)))


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_arrays_of_numpy_are_taken_by_one_call(monkeypatch, moment_dtype):
    """Such as gradients, or a checkpoint; the state that comes back has none."""
    params = _tree(jnp.bfloat16) | {"count": jnp.int32(3)}
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding="stochastic")
    expected = opt.update(params, opt.init(params), params)
    monkeypatch.setattr(_optimizer, "_update", None)
    arrays = jax.tree.map(np.asarray, (params, opt.init(params), params))
    got = opt.update(*arrays)
    assert_equal(got, expected)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_a_state_of_numpy_becomes_one_of_jax(monkeypatch, moment_dtype):
    """Also leaf by leaf, so that the next step may be one call."""
    params = _tree(jnp.bfloat16) | {"count": jnp.int32(3)}
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding="stochastic")
    monkeypatch.setattr(_optimizer, "_update_in_one_call", _optimizer._update)
    _, state = opt.update(params, jax.tree.map(np.asarray, opt.init(params)), params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("moment_dtype", ["bfloat16", "uint8"])
def test_a_tree_of_many_leaves_goes_leaf_by_leaf(monkeypatch, moment_dtype):
    """Bit for bit as in one call, and no compiled call has more than one of the leaves."""
    params = _tree()
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype)
    state = opt.init(params)
    expected = opt.update(params, state, params)
    monkeypatch.setattr(_optimizer, "_MOST_LEAVES", len(params) - 1)
    monkeypatch.setattr(_optimizer, "_update_in_one_call", None)
    assert_equal(opt.update(params, state, params), expected)


def test_numbers_have_the_precision_of_the_mode():
    """Those that were brought to the device in 32 bits do not stay so in 64."""
    lr = 0.1 + 1e-9
    for _ in range(2):
        updates, _ = adamaxw.adamax(lr).update(jnp.ones(1), adamaxw.adamax(lr).init(jnp.ones(1)))
        np.testing.assert_allclose(updates, -lr, rtol=1e-6)
        with x64():
            params = jnp.ones(1, jnp.float64)
            opt = adamaxw.adamax(lr)
            updates, _ = opt.update(params, opt.init(params))
            np.testing.assert_allclose(updates, -lr / (1 + 1e-8), rtol=1e-14)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_numbers_belong_to_no_mesh(monkeypatch, axis_type):
    """One call serves another device after a step under a mesh that was set, with the same rate."""
    mesh = Mesh(np.array(jax.devices()[:4]), "x", axis_types=(axis_type,))
    opt = adamaxw.adamaxw(0.1)
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("x")))
        expected, _ = opt.update(params, opt.init(params), params)
    monkeypatch.setattr(_optimizer, "_update", None)
    params = jax.device_put(np.arange(8, dtype=np.float32), jax.devices()[5])
    updates, _ = opt.update(params, opt.init(params), params)
    assert updates.device == jax.devices()[5]
    assert_equal(updates, expected)


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_leaves_as_arrays_of_their_own(monkeypatch, moment_dtype):
    """No compiled call spans two devices, so outside jit each leaf has its own, where it lies."""
    params = _tree()
    places = {name: jax.devices()[int(name) % 3] for name in params}
    apart = jax.tree.map(jax.device_put, params, places)
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype)
    state, apart_state = opt.init(params), opt.init(apart)
    _, state = opt.update(params, state, params)
    _, apart_state = opt.update(apart, apart_state, apart)
    # Once it has failed, the one call is not tried again.
    monkeypatch.setattr(_optimizer, "_update_in_one_call", None)
    apart_updates, apart_state = opt.update(apart, apart_state, apart)
    monkeypatch.undo()
    updates, state = opt.update(params, state, params)
    assert_equal(apart_updates, updates)
    assert_equal(apart_state, state)
    for tree in (apart_updates, apart_state.mu, apart_state.nu):
        assert {name: tree[name].device for name in params} == places


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_leaves_placed_after_init_or_without_gradients_in_turn(moment_dtype):
    """What lies nowhere in particular goes along, and scalars stay free to go anywhere."""
    devices = jax.devices()
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    opt = adamaxw.adamaxw(0.1, moment_dtype=moment_dtype)
    state = opt.init(params)
    params = jax.tree.map(jax.device_put, params, {"a": devices[0], "b": devices[1]})
    updates, state = opt.update(params, state, params)
    assert {name: x.device for name, x in updates.items()} == {"a": devices[0], "b": devices[1]}
    _, state = opt.update(params | {"b": None}, state, params)
    updates, state = opt.update(params | {"a": None}, state, params)
    assert int(state.count) == 3
    assert updates["b"].device == devices[1]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_leaves_on_different_meshes(axis_type):
    """With their devices in another order, or axes of another name: a call each, too."""
    devices = np.array(jax.devices()[:4])
    meshes = (
        Mesh(devices, "x", axis_types=(axis_type,)),
        Mesh(devices[::-1].reshape(2, 2), ("x", "y"), axis_types=(axis_type,) * 2),
    )
    params = {"a": jnp.arange(4.0), "b": jnp.arange(8.0)}
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
        for (name, x), mesh in zip(params.items(), meshes, strict=True)
    }
    opt = adamaxw.adamaxw(1e-2)
    updates, _ = opt.update(params, opt.init(params), params)
    assert_equal(opt.update(placed, opt.init(placed), placed)[0], updates)


def test_a_schedule_outside_jit_sees_the_count():
    """It may be any Python function there, as with Optax, and is called at each step."""
    seen = []

    def schedule(count):
        seen.append(int(count))
        return 0.1 if count < 1 else 0.2

    params = jnp.ones(3)
    opt = adamaxw.adamax(schedule, b1=0.0)
    state = opt.init(params)
    first, state = opt.update(params, state)
    second, state = opt.update(params, state)
    assert seen == [0, 1]
    np.testing.assert_allclose(first, -0.1, rtol=1e-6)
    np.testing.assert_allclose(second, -0.2, rtol=1e-6)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA of that time makes a float32 temporary for bfloat16"
)
@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_the_compiled_step_has_no_temporaries(moment_dtype):
    """Donated float32 parameters and their moments are updated where they are."""
    params = jnp.zeros((256, 1000))
    opt = adamaxw.adamaxw(1e-3, moment_dtype=moment_dtype)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(params, opt.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes / params.size < 0.01
