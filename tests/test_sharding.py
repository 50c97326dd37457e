"""`adamaxw.sharding`: where the state lies, spread over a mesh, and what a step then costs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal_across_meshes, types_of
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates
from pure import as_pure
from scaling import collectives

import adamaxw
from adamaxw import sharding

_FORMATS = (None, "bfloat16", "uint8")
_SPECS = {"w": P(None, "model"), "b": P("model"), "s": P(), "odd": P()}
_SHAPES = {"w": (8, 6), "b": (4,), "s": (), "odd": (3, 5)}
_AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def _mesh(axis_type=AxisType.Auto, shape=(4, 2)):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)


def _params(mesh, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        name: jax.device_put(
            jnp.asarray(rng.normal(size=shape), dtype), NamedSharding(mesh, _SPECS[name])
        )
        for name, shape in _SHAPES.items()
    }


def _abstract(params):
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )


def _specs(tree):
    return {name: tuple(getattr(x, "sharding", x).spec) for name, x in tree.items()}


def _adamaxw(**options):
    return adamaxw.adamaxw(1e-2, weight_decay=0.1, **options)


_OPTIMIZERS = {
    "float32": _adamaxw(),
    "exact": _adamaxw(moment_dtype="uint8", param_rounding="exact"),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), _adamaxw(), optax.ema(0.9)),
    "masked": optax.masked(_adamaxw(), {"w": True, "b": False, "s": True, "odd": False}),
    "partition": optax.partition(
        {"ours": _adamaxw(moment_dtype="uint8"), "theirs": optax.adamw(1e-2)},
        {"w": "ours", "b": "theirs", "s": "ours", "odd": "theirs"},
    ),
    "MultiSteps": optax.MultiSteps(_adamaxw(), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(adamaxw.adamaxw, hyperparam_dtype=jnp.float32)(
        1e-2
    ),
    "with a mask": _adamaxw(mask=adamaxw.masks.matrices),
}


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("name", _OPTIMIZERS)
@_AXIS_TYPES
def test_follows_the_params_in_every_wrapper(axis_type, name, abstract):
    """What init makes of placed params lies there, and what else there is, on every device."""
    opt, params = _OPTIMIZERS[name], _params(_mesh(axis_type), jnp.bfloat16)
    found = sharding.of_state(opt, _abstract(params) if abstract else params)
    state = opt.init(params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x, where in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        expected = x.sharding if x.ndim else NamedSharding(where.mesh, P())
        assert where.is_equivalent_to(expected, x.ndim)
    # With another mesh, none of it is that of the devices on which init would have put it.
    jax.block_until_ready(jax.jit(opt.init, out_shardings=found)(params))


@_AXIS_TYPES
def test_spread_over_the_data_axis(axis_type):
    """Along the first dimension that divides and is not sharded; the others stay as they are."""
    opt = _adamaxw(moment_dtype="uint8", param_rounding="exact")
    params = _params(_mesh(axis_type), jnp.bfloat16)
    found = sharding.of_state(opt, params, data_axis="data")
    spread = {"w": ("data", "model"), "b": ("model",), "s": (), "odd": ()}
    assert _specs(found.mu) == _specs(found.nu) == _specs(found.residual) == spread
    assert found.count.spec == found.nu_scale.spec == P()


@pytest.mark.parametrize(
    ("shape", "spec", "data_axis", "expected"),
    [
        ((3, 8), P(), "data", (None, "data")),
        ((3, 8), P(), ("data", "model"), (None, ("data", "model"))),
        ((4, 4), P(), ("data", "model"), ()),
        ((8, 8), P("data"), "data", ("data",)),
        ((8, 8), P(None, ("model", "data")), "data", (None, ("model", "data"))),
        ((8, 8), P("data"), ("data", "model"), ("data", "model")),
        ((8, 8), P("model"), ("data", "model"), ("model", "data")),
        ((0, 8), P(), "data", (None, "data")),
        ((2, 3, 3), P(), "data", ()),
        ((), P(), "data", ()),
        ((8,), P(), (), ()),
    ],
)
def test_where_a_leaf_is_split(shape, spec, data_axis, expected):
    """Over those of the axes that it is not sharded over, all or none of them."""
    where = NamedSharding(_mesh(), spec)
    p = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    found = sharding.of_state(_adamaxw(), p, data_axis=data_axis)
    assert tuple(found.mu.spec) == tuple(found.nu.spec) == expected


def test_a_leaf_that_does_not_train_stays():
    """Its updates are zeros that lie like its moments: spread, its type would change in a loop."""
    mesh = _mesh(AxisType.Explicit)
    everywhere = NamedSharding(mesh, P())
    params = {"w": jnp.ones((8, 8)), "steps": jnp.arange(8), "alive": jnp.ones(8, bool)}
    params = jax.device_put(params, everywhere)
    opt = _adamaxw(moment_dtype="uint8")
    found = sharding.of_state(opt, params, data_axis="data")
    assert _specs(found.mu) == _specs(found.nu) == {"w": ("data", None), "steps": (), "alive": ()}
    state = jax.jit(opt.init, out_shardings=found)(params)
    updates, new = jax.jit(opt.update)(params, state, params)
    assert types_of(updates) == types_of(params)
    assert types_of(new) == types_of(state)


def test_paths_that_end_alike():
    """A parameter may be called like a part of the state, or like a part of another's path."""
    mesh = _mesh()
    specs = {"mu": {"mu": P("data"), "x": P(None, "data")}, "x": P("model"), "count": P(None)}
    params = jax.tree.map(
        lambda spec: jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec)),
        specs,
        is_leaf=lambda x: isinstance(x, P),
    )
    opt = optax.chain(optax.trace(0.9), _adamaxw())
    found = sharding.of_state(opt, params)
    for tree in (found[0].trace, found[1].mu, found[1].nu):
        assert jax.tree.map(lambda x: x.spec, tree) == specs
    assert found[1].count.spec == P()


def test_in_lookahead():
    """Its params are pairs, of which our state belongs to one."""
    params = _params(_mesh())
    opt = optax.lookahead(_adamaxw(), 3, 0.5)
    found = sharding.of_state(opt, optax.LookaheadParams.init_synced(params), data_axis="data")
    assert found.fast_state.mu["w"].spec == P("data", "model")
    assert found.fast_state.nu["b"].spec == P("model")


def test_in_a_transformation_that_flattens():
    """No leaf of the state has the path of a parameter: all are replicated."""
    params = _params(_mesh(AxisType.Explicit))
    found = sharding.of_state(optax.flatten(_adamaxw()), params)
    assert all(where.spec == P() for where in jax.tree.leaves(found))


def test_only_our_moments_are_spread():
    """Other transformations compute with theirs where the params are."""
    opt = optax.chain(optax.ema(0.9), _adamaxw())
    found = sharding.of_state(opt, _params(_mesh()), data_axis="data")
    assert found[0].ema["w"].spec == P(None, "model")
    assert found[1].mu["w"].spec == P("data", "model")


def test_state_of_flax_nnx():
    """Params may hold Variables; their shardings come back in them."""
    mesh = _mesh()
    params = nnx.state(nnx.Linear(8, 2, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.device_put(params, NamedSharding(mesh, P()))
    opt = _adamaxw()
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)
    assert _specs(as_pure(state.mu)) == {"kernel": ("data", None), "bias": ()}


def test_abstract_mesh():
    """Nothing is allocated, and no device is needed: 4,096 of them."""
    mesh = AbstractMesh((512, 8), ("data", "model"))
    where = NamedSharding(mesh, P(None, "model"))
    params = {"w": jax.ShapeDtypeStruct((2**20, 2**13), jnp.bfloat16, sharding=where)}
    opt = _adamaxw(moment_dtype="uint8")
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found).eval_shape(params)
    assert found.mu["w"].shard_shape((2**20, 2**13)) == (2**11, 2**10)
    lines = str(sharding.describe(state)).splitlines()
    assert lines[-2].split() == ["a", "device", f"{2 * 2**21 + 12:,}"]
    assert lines[-1].split()[-1] == f"{2 * 2**33 + 12:,}"


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
def test_memory_of_an_abstract_mesh(memory_kind):
    """It is that of the params, or what is asked for: no device is there to be asked."""
    where = NamedSharding(AbstractMesh((8,), ("data",)), P(), memory_kind="unpinned_host")
    params = jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=where)
    found = sharding.of_state(_adamaxw(), params, data_axis="data", memory_kind=memory_kind)
    assert found.mu.memory_kind == (memory_kind or "unpinned_host")
    assert found.mu.spec == P("data", None)
    assert found.count.memory_kind is None


def test_params_on_one_device_or_on_none():
    """The state lies with them, and jit takes the shardings."""
    second = jax.devices()[1]
    for p, device in (
        (jax.device_put(jnp.ones(3), second), second),
        (jnp.ones(3), jax.devices()[0]),
        (np.ones(3, np.float32), jax.devices()[0]),
        ({"a": 1.0, "b": jax.device_put(jnp.ones(3), second)}, second),
        ({}, jax.devices()[0]),
    ):
        found = sharding.of_state(_adamaxw(), p)
        state = jax.jit(_adamaxw().init, out_shardings=found)(p)
        assert all(x.device == device for x in jax.tree.leaves(state))


def test_what_lies_nowhere_is_replicated():
    """As jit takes a number, or an array that is committed nowhere, beside params on a mesh."""
    mesh = _mesh()
    w = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    params = {"w": w, "number": 2.0, "array": jnp.ones(4)}
    found = sharding.of_state(_adamaxw(), params, data_axis="model")
    assert _specs(found.mu) == {"w": ("data",), "number": (), "array": ("model",)}


@pytest.mark.parametrize("moment_dtype", _FORMATS)
@_AXIS_TYPES
def test_no_device_ever_holds_the_whole_state(axis_type, moment_dtype):
    """Born by a compiled init, each device has 1/8 of it, and nothing else was there."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    params = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, P()))
    opt = _adamaxw(moment_dtype=moment_dtype)
    init = jax.jit(opt.init, out_shardings=sharding.of_state(opt, params, data_axis="data"))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(init.eval_shape(params)))
    memory = init.lower(params).compile().memory_analysis()
    # The hash of parameters of which noise is made: XLA on the CPU does not sum it as it goes.
    hashed = 0 if moment_dtype is None else 4 * 64 * 128
    # The scalars are on every device; temporaries are for those.
    assert memory.output_size_in_bytes < whole / 8 + 64
    # The other temporaries are for the scalars.
    assert memory.temp_size_in_bytes <= hashed + 64

    before = {id(x) for x in jax.live_arrays()}
    state = jax.block_until_ready(init(params))
    held = dict.fromkeys(mesh.devices.flat, 0)
    for x in jax.live_arrays():
        if id(x) not in before:
            for shard in x.addressable_shards:
                held[shard.device] += shard.data.nbytes
    scalars = 4 if moment_dtype is None else 12
    assert set(held.values()) == {(whole - scalars) // 8 + scalars}
    assert state.count.is_fully_replicated


@pytest.mark.parametrize("gradients", ["replicated", "spread"])
@pytest.mark.parametrize("moment_dtype", _FORMATS)
@_AXIS_TYPES
def test_the_update_gathers_each_parameter_once(axis_type, moment_dtype, gradients):
    """No other communication, and no temporary of the size of the state.

    There is the part of each device before it is gathered, in bfloat16 two. Where axes are explicit
    updates lie like the gradients: they are gathered, and then added, unless those are spread.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    everywhere = NamedSharding(mesh, P())
    shapes = {"w": (64, 256), "v": (16, 64), "odd": (3, 5)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
        for name, shape in shapes.items()
    }
    opt = _adamaxw(moment_dtype=moment_dtype)
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found).eval_shape(params)
    grads = params
    if gradients == "spread":
        grads = jax.tree.map(
            lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where),
            params,
            found.mu,
        )

    @functools.partial(jax.jit, out_shardings=(everywhere, found), donate_argnums=(1, 2))
    def step(grads, state, params):
        updates, state = opt.update(grads, state, params)
        if gradients == "spread" and axis_type == AxisType.Explicit:
            params = jax.tree.map(jax.sharding.reshard, params, found.mu)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(grads, state, params).compile()
    assert sorted(collectives(compiled.as_text())) == [
        ("all-gather", "f32[16,64]"),
        ("all-gather", "f32[64,256]"),
    ]
    whole = sum(4 * math.prod(shape) for shape in shapes.values())
    parts = 2 if moment_dtype == "bfloat16" else 1
    gathered = whole if gradients == "replicated" and axis_type == AxisType.Explicit else 0
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries <= parts * whole / 8 + gathered + 2048


# In real processes test_example_distributed.py has every format and rounding.
@pytest.mark.parametrize(
    ("moment_dtype", "param_rounding"),
    [(None, "nearest"), ("bfloat16", "stochastic"), ("uint8", "stochastic"), ("uint8", "exact")],
)
@_AXIS_TYPES
def test_a_spread_state_trains_as_on_one_device(axis_type, moment_dtype, param_rounding):
    """Types and places stay through a loop, and numbers are those of one device."""
    mesh = _mesh(axis_type)
    params = _params(mesh, jnp.bfloat16)
    alone = jax.tree.map(np.asarray, params)
    opt = _adamaxw(moment_dtype=moment_dtype, param_rounding=param_rounding)
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)
    where = jax.tree.map(lambda p: p.sharding, params)

    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.cos(3 * p.astype(jnp.float32)), params)
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    spread_step = jax.jit(step, out_shardings=(where, found))
    types = types_of((params, state))
    state_alone, step = opt.init(alone), jax.jit(step)
    for _ in range(3):
        params, state = spread_step(params, state)
        alone, state_alone = step(alone, state_alone)
        assert types_of((params, state)) == types
    assert spread_step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, state) == found
    assert_equal_across_meshes((params, state), (alone, state_alone))


@_AXIS_TYPES
def test_a_loop_with_a_spread_state(axis_type):
    """Under scan: explicit types of params and state are those of before."""
    mesh = _mesh(axis_type)
    params = _params(mesh)
    opt = _adamaxw()
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = opt.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=3)[0]

    trained, new = train(params, state)
    assert types_of((trained, new)) == types_of((params, state))
    for _ in range(3):
        updates, state = opt.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert_equal_across_meshes((trained, new), (params, state))


@_AXIS_TYPES
def test_gradients_that_lie_nowhere(axis_type):
    """Arrays of NumPy go where the state is."""
    params = _params(_mesh(axis_type))
    opt = _adamaxw()
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)
    grads = jax.tree.map(np.asarray, params)
    for update in (opt.update, jax.jit(opt.update)):
        updates, _ = update(grads, state, params)
        expected, _ = update(params, state, params)
        assert_equal_across_meshes(updates, expected)
        assert types_of(updates) == types_of(params)


@_AXIS_TYPES
def test_master_params_of_a_spread_state(axis_type):
    """The residuals lie elsewhere than the params."""
    params = _params(_mesh(axis_type), jnp.bfloat16)
    opt = _adamaxw(param_rounding="exact")
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)
    for _ in range(3):
        updates, state = opt.update(params, state, params)
        params = apply_updates(params, updates)
    weights = adamaxw.moments.master_params(params, state)
    alone = jax.tree.map(np.asarray, (params, state))
    assert_equal_across_meshes(weights, adamaxw.moments.master_params(*alone))
    if axis_type == AxisType.Explicit:
        assert _specs(weights) == _specs(state.mu)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="jax knows no reduced types before")
def test_gradients_with_their_sum_still_to_do():
    """Those of params marked as reduced are summed where the state lies; updates are as there."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = {"w": jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P()))}
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    opt = _adamaxw()
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found)(params)

    def loss(params):
        return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)

    @jax.jit
    def step(params, state):
        reduced = jax.tree.map(lambda p: jax.sharding.reshard(p, P(reduced={"data"})), params)
        grads = jax.grad(loss)(reduced)
        assert jax.typeof(grads["w"]).sharding.spec.unreduced == {"data"}
        return opt.update(grads, state, params)

    with jax.set_mesh(mesh):
        updates, new = step(params, state)
    exact = jax.grad(lambda p: jnp.sum(jnp.tanh(np.asarray(x) @ p["w"]) ** 2))
    alone = jax.tree.map(np.asarray, params)
    expected, state = opt.update(exact(alone), opt.init(alone), alone)
    assert updates["w"].sharding.spec == new.mu["w"].sharding.spec == P("data", None)
    # Sums of eight numbers of about 1, in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, (updates, new), (expected, state))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA of that time does not partition moves on the CPU"
)
@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_state_in_the_memory_of_the_host(moment_dtype):
    """Streamed to the device for the update and back; the numbers are those without."""
    params = _params(_mesh())
    opt = _adamaxw(moment_dtype=moment_dtype)
    on_device = sharding.of_state(opt, params, data_axis="data")
    on_host = sharding.of_state(opt, params, data_axis="data", memory_kind="pinned_host")
    where = jax.tree.map(lambda p: p.sharding, params)

    def step(params, state):
        updates, state = opt.update(params, jax.device_put(state, on_device), params)
        return optax.apply_updates(params, updates), state

    results = []
    for place in (on_host, on_device):
        state = jax.jit(opt.init, out_shardings=place)(params)
        assert state.mu["w"].sharding.memory_kind == place.mu["w"].memory_kind
        stepped = jax.jit(step, out_shardings=(where, place))(params, state)
        assert jax.tree.map(lambda x: x.sharding, stepped[1]) == place
        results.append(stepped)
    assert on_host.mu["w"].memory_kind == "pinned_host"
    assert on_host.count == on_device.count
    assert_equal_across_meshes(*results)


def test_describe_arrays():
    """Path, place, how many hold the same part, bytes of a part."""
    params = _params(_mesh()) | {"alone": jnp.ones(3, jnp.int8), "empty": jnp.ones((0, 2))}
    rows = {row[0]: row[1:] for row in sharding.describe(params).rows}
    assert rows["w"] == ("(8, 6)", "float32", "P(None, 'model')", "4", "96")
    assert rows["s"] == ("()", "float32", "P()", "8", "4")
    assert rows["alone"] == ("(3,)", "int8", "one device", "1", "3")
    assert rows["empty"][-2:] == ("1", "0")
    *_, on_device, in_all = str(sharding.describe(params)).splitlines()
    held = sum(
        shard.data.nbytes
        for x in params.values()
        for shard in x.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert on_device.split() == ["a", "device", str(held)]
    assert sharding.bytes_a_device(params) == held
    assert in_all.split()[-1] == str(sum(x.nbytes for x in params.values()))
    assert len(sharding.describe({}).rows) == 0


def test_describe_what_lies_in_another_memory():
    """It is not counted as memory of the devices."""
    mesh = AbstractMesh((8,), ("data",))
    where = NamedSharding(mesh, P("data"))
    tree = {
        "here": jax.ShapeDtypeStruct((16, 3), jnp.int8, sharding=where),
        "there": jax.ShapeDtypeStruct(
            (16, 5), jnp.int8, sharding=where.with_memory_kind("pinned_host")
        ),
    }
    table = sharding.describe(tree)
    assert [row[3] for row in table.rows] == ["P('data')", "P('data'), pinned_host"]
    assert [(row[0], row[-1]) for row in table.footer] == [
        ("a device", "6"),
        ("its pinned_host", "10"),
        ("in all, each once", "128"),
    ]
    assert sharding.bytes_a_device(tree) == 6


class _Other(Sharding):
    """As of programs that are not written in JAX."""

    def check_compatible_aval(self, aval_shape):
        """Fits all."""


_LEAF = jax.ShapeDtypeStruct((8,), jnp.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: sharding.of_state(_adamaxw(), p, data_axis="rows"), ValueError, "'rows'"),
        (
            lambda p: sharding.of_state(_adamaxw(), p, data_axis=("data", "rows")),
            ValueError,
            r"data_axis.*\('data', 'model'\), got 'rows'",
        ),
        (lambda p: sharding.of_state(_adamaxw(), p, data_axis=3), TypeError, "data_axis.*got 3"),
        (
            lambda p: sharding.of_state(_adamaxw(), p, data_axis=("data", "data")),
            ValueError,
            r"data_axis.*once, got \('data', 'data'\)",
        ),
        (
            lambda p: sharding.of_state(
                _adamaxw(), {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=_Other())}
            ),
            ValueError,
            r"params\['w'\] must have a NamedSharding",
        ),
        (
            lambda p: sharding.of_state(_adamaxw(), p, memory_kind="disk"),
            ValueError,
            "memory_kind.*cpu devices have, .*'device'.*, got 'disk'",
        ),
        (
            lambda p: sharding.of_state(_adamaxw(), {"a": {"w": _LEAF}}),
            ValueError,
            r"params\['a'\]\['w'\].*without a sharding",
        ),
        (
            lambda p: sharding.of_state(_adamaxw(), jnp.ones(8), data_axis="data"),
            ValueError,
            r"data_axis.*axes \(\), got 'data'.*device_put",
        ),
        (
            lambda p: sharding.of_state(
                _adamaxw(), p | {"b": jax.device_put(jnp.ones(4), jax.devices()[1])}
            ),
            ValueError,
            "one mesh",
        ),
        (
            lambda p: jax.jit(lambda q: sharding.of_state(_adamaxw(), q) and q)(p),
            TypeError,
            r"params\['b'\] is traced",
        ),
        (
            lambda p: sharding.of_state(_adamaxw(), p | {"b": "text"}),
            TypeError,
            r"params\['b'\].*'text'",
        ),
        (lambda p: sharding.describe({"a": {"w": _LEAF}}), TypeError, "'a/w'"),
        (lambda p: sharding.describe([np.ones(3)]), TypeError, "'0'.*float64 of shape"),
        (lambda p: sharding.of_state(None, p), TypeError, "opt must be"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(_params(_mesh()))


def test_parts_that_do_not_divide_are_an_error():
    """As for jit, which has no uneven parts."""
    where = NamedSharding(_mesh(), P("data"))
    x = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=where)
    with pytest.raises(ValueError, match=r"'x'.*divide"):
        sharding.describe({"x": x})
