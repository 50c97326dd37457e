"""On meshes of eight devices: where the state lies, what a step costs, and the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import AXIS_TYPES, EVERY_FORMAT, EVERY_MOMENT_DTYPE, REFUSED, WRAPPERS, make_params
from equality import assert_equal_but_for_last_bits, types_of
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates
from scaling import collectives

import adamaxw
from adamaxw import sharding

_SPECS = {"w": P(None, "model"), "b": P("model"), "s": P(), "odd": P()}
_OPT = adamaxw.adamaxw(1e-2, weight_decay=0.1)
_COMPILE_FAST = pytest.mark.usefixtures("compile_fast")


def _mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def _params(mesh, dtype=jnp.float32):
    places = {name: NamedSharding(mesh, spec) for name, spec in _SPECS.items()}
    return jax.device_put(make_params(dtype), places)


def _abstract(params):
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )


def _specs(tree):
    return {name: tuple(getattr(x, "sharding", x).spec) for name, x in tree.items()}


def _places(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def _spread(opt, params):
    """The state of `opt` spread over the axis "data", and its shardings."""
    found = sharding.of_state(opt, params, data_axis="data")
    return jax.jit(opt.init, out_shardings=found)(params), found


def _steps(opt, params, state, wrap, number=3):
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.cos(3 * p.astype(jnp.float32)), params)
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    step = wrap(step)
    for _ in range(number):
        params, state = step(params, state)
    return params, state


@_COMPILE_FAST
@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "flatten"])
@AXIS_TYPES
def test_follows_the_params_in_every_wrapper(axis_type, wrapper):
    """What init makes of placed params lies there, and what else there is, on every device."""
    make = functools.partial(adamaxw.adamaxw, moment_dtype="uint8", param_rounding="exact")
    opt, params = WRAPPERS[wrapper](make), _params(_mesh(axis_type), jnp.bfloat16)
    found = sharding.of_state(opt, params)
    assert sharding.of_state(opt, _abstract(params)) == found
    state = opt.init(params)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for x, where in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        expected = x.sharding if x.ndim else NamedSharding(where.mesh, P())
        assert where.is_equivalent_to(expected, x.ndim)
    # It must not mix meshes, which jit refuses.
    jax.jit(opt.init, out_shardings=found).lower(params)


@AXIS_TYPES
def test_spread_over_the_data_axis(axis_type):
    """Our moments and residuals; other transformations compute with theirs where the params are."""
    params = _params(_mesh(axis_type), jnp.bfloat16)
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8", param_rounding="exact")
    other, found = sharding.of_state(optax.chain(optax.ema(0.9), opt), params, data_axis="data")
    spread = {"w": ("data", "model"), "b": ("model",), "s": (), "odd": ()}
    assert _specs(found.mu) == _specs(found.nu) == _specs(found.residual) == spread
    assert found.count.spec == found.nu_scale.spec == P()
    assert other.ema["w"].spec == P(None, "model")


def test_where_a_leaf_is_split():
    """Along the first dimension that divides and is not sharded, over all or none of the axes."""
    both = ("data", "model")
    for shape, spec, data_axis, expected in (
        ((3, 8), P(), "data", P(None, "data")),
        ((3, 8), P(), both, P(None, both)),
        ((4, 4), P(), both, P()),
        ((8, 8), P("data"), "data", P("data")),
        ((8, 8), P(None, ("model", "data")), "data", P(None, ("model", "data"))),
        ((8, 8), P("data"), both, P("data", "model")),
        ((2, 3, 3), P(), "data", P()),
        ((8,), P(), (), P()),
    ):
        p = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(_mesh(), spec))
        found = sharding.of_state(_OPT, p, data_axis=data_axis)
        assert found.mu.spec == found.nu.spec == expected


@_COMPILE_FAST
def test_a_leaf_that_does_not_train_stays():
    """Its updates are zeros that lie like its moments: spread, its type would change in a loop."""
    params = {"w": jnp.ones((8, 8)), "steps": jnp.arange(8), "alive": jnp.ones(8, bool)}
    params = jax.device_put(params, NamedSharding(_mesh(AxisType.Explicit), P()))
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8")
    state, found = _spread(opt, params)
    assert _specs(found.mu) == _specs(found.nu) == {"w": ("data", None), "steps": (), "alive": ()}
    updates, new = jax.jit(opt.update)(params, state, params)
    assert types_of((updates, new)) == types_of((params, state))


def test_paths_that_end_alike():
    """A parameter may be called like a part of the state, or like a part of another's path."""
    specs = {"mu": {"mu": P("data"), "x": P(None, "data")}, "x": P("model"), "count": P(None)}
    places = jax.tree.map(
        lambda spec: NamedSharding(_mesh(), spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    params = jax.tree.map(lambda where: jax.device_put(jnp.ones((8, 8)), where), places)
    found = sharding.of_state(optax.chain(optax.trace(0.9), _OPT), params)
    assert found[0].trace == found[1].mu == found[1].nu == places
    assert found[1].count.spec == P()


def test_where_params_have_another_structure():
    """Lookahead has pairs of params, and flatten has one vector."""
    params = _params(_mesh())
    pairs = optax.LookaheadParams.init_synced(params)
    found = sharding.of_state(optax.lookahead(_OPT, 3, 0.5), pairs, data_axis="data")
    assert found.fast_state.mu["w"].spec == P("data", "model")
    assert found.fast_state.nu["b"].spec == P("model")
    found = sharding.of_state(optax.flatten(_OPT), params)
    assert all(where.spec == P() for where in jax.tree.leaves(found))


def test_abstract_mesh():
    """Nothing is allocated, and no device is needed; memory is that of params or what is asked."""
    where = NamedSharding(AbstractMesh((512, 8), ("data", "model")), P(None, "model"))
    where = where.with_memory_kind("unpinned_host")
    params = {"w": jax.ShapeDtypeStruct((2**20, 2**13), jnp.bfloat16, sharding=where)}
    for kind in (None, "pinned_host"):
        found = sharding.of_state(_OPT, params, data_axis="data", memory_kind=kind)
        assert found.mu["w"].shard_shape((2**20, 2**13)) == (2**11, 2**10)
        assert found.mu["w"].memory_kind == (kind or "unpinned_host")
        assert found.count.memory_kind is None


def test_what_lies_nowhere():
    """On the one device of the others, or replicated on their mesh; jit takes the shardings."""
    first, second = jax.devices()[:2]
    for p, device in (
        (np.ones(3, np.float32), first),
        ({"a": 1.0, "b": jax.device_put(jnp.ones(3), second)}, second),
        ({}, first),
    ):
        state = jax.jit(_OPT.init, out_shardings=sharding.of_state(_OPT, p))(p)
        assert all(x.device == device for x in jax.tree.leaves(state))
    w = jax.device_put(jnp.ones(8), NamedSharding(_mesh(), P("data")))
    found = sharding.of_state(_OPT, {"w": w, "n": 2.0, "x": jnp.ones(4)}, data_axis="model")
    assert _specs(found.mu) == {"w": ("data",), "n": (), "x": ("model",)}


def test_errors_say_what_is_wrong():
    """An unknown axis, params without a sharding, params on several meshes."""
    params = _params(_mesh())
    for p, how, named in (
        (params, {"data_axis": "rows"}, "data_axis"),
        (jnp.ones(8), {"data_axis": "data"}, "data_axis"),
        ({"a": {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}}, {}, r"params\['a'\]\['w'\]"),
        (params | {"b": jax.device_put(1.0, jax.devices()[1])}, {}, "params"),
    ):
        with pytest.raises(REFUSED, match=named):
            sharding.of_state(_OPT, p, **how)


@_COMPILE_FAST
@pytest.mark.parametrize("is_abstract", [False, True])
@pytest.mark.parametrize("place", [AxisType.Auto, AxisType.Explicit, "one device"])
def test_compiles_once(place, is_abstract):
    """The state is made where the params lie, or will lie, and a compiled step leaves it there."""
    on_mesh = place != "one device"
    params = _params(_mesh(place)) if on_mesh else jax.device_put(make_params(), jax.devices()[1])
    state = _OPT.init(_abstract(params) if is_abstract else params)
    expected = jax.tree.leaves(sharding.of_state(_OPT, params))
    for x, where in zip(jax.tree.leaves(state), expected, strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    traces = []
    new = _steps(
        _OPT, params, state, lambda step: jax.jit(lambda *args: traces.append(args) or step(*args))
    )
    assert types_of(new) == types_of((params, state))
    assert len(traces) == 1


@_COMPILE_FAST
@EVERY_FORMAT
@AXIS_TYPES
def test_a_spread_state_trains_as_on_one_device(axis_type, moment_dtype, param_rounding):
    """Types and places stay, and the noise is the same: so are all numbers, up to last bits.

    So are the float32 weights that are read from it.
    """
    params = _params(_mesh(axis_type), jnp.bfloat16)
    opt = adamaxw.adamaxw(
        1e-2, weight_decay=0.1, moment_dtype=moment_dtype, param_rounding=param_rounding
    )
    alone = make_params(jnp.bfloat16)
    expected = _steps(opt, alone, opt.init(alone), jax.jit)
    state, found = _spread(opt, params)
    types = types_of((params, state))
    wrap = functools.partial(jax.jit, out_shardings=(_places(params), found))
    got = _steps(opt, params, state, wrap)
    assert types_of(got) == types
    assert _places(got) == (_places(params), found)
    assert_equal_but_for_last_bits(got, expected)
    weights = adamaxw.moments.master_params(*got)
    assert_equal_but_for_last_bits(weights, adamaxw.moments.master_params(*expected))
    if (axis_type, param_rounding) == (AxisType.Explicit, "exact"):
        assert weights["w"].sharding == state.mu["w"].sharding


@_COMPILE_FAST
def test_inside_shard_map():
    """The update is local: under shard_map it works on the shards, types of variance included."""
    mesh = _mesh()
    params = _params(mesh)
    state = _OPT.init(params)
    specs = adamaxw.AdamaxState(P(), _SPECS, _SPECS)
    wrap = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(_SPECS, specs), out_specs=(_SPECS, specs)
    )
    got = _steps(_OPT, params, state, lambda step: jax.jit(wrap(step)))
    assert_equal_but_for_last_bits(got, _steps(_OPT, params, state, jax.jit))


def test_a_spread_state_without_out_shardings():
    """The parameters come back split as well, under jax.jit and outside."""
    params = _params(_mesh())
    state, _ = _spread(_OPT, params)
    for update in (_OPT.update, jax.jit(_OPT.update)):
        new = optax.apply_updates(params, update(params, state, params)[0])
        assert _specs(new)["w"] == _specs(state.mu)["w"] != _specs(params)["w"]


@_COMPILE_FAST
@AXIS_TYPES
def test_gradients_that_lie_nowhere(axis_type):
    """Arrays of NumPy go where the state is."""
    params = _params(_mesh(axis_type))
    state, _ = _spread(_OPT, params)
    for update in (_OPT.update, jax.jit(_OPT.update)):
        updates, _ = update(jax.tree.map(np.asarray, params), state, params)
        assert_equal_but_for_last_bits(updates, update(params, state, params)[0])
        assert types_of(updates) == types_of(params)


@EVERY_MOMENT_DTYPE
@AXIS_TYPES
def test_the_update_gathers_each_parameter_once(axis_type, moment_dtype):
    """No other communication, and no temporary of the size of the state."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    everywhere = NamedSharding(mesh, P())
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
        for name, shape in {"w": (64, 256), "v": (16, 64), "odd": (3, 5)}.items()
    }
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype)
    found = sharding.of_state(opt, params, data_axis="data")
    state = jax.jit(opt.init, out_shardings=found).eval_shape(params)

    @functools.partial(jax.jit, out_shardings=(everywhere, found), donate_argnums=(1, 2))
    def step(grads, state, params):
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(params, state, params).compile()
    assert sorted(collectives(compiled.as_text())) == [
        ("all-gather", "f32[16,64]"),
        ("all-gather", "f32[64,256]"),
    ]
    whole = 4 * sum(p.size for p in params.values())
    # The part of each device before it is gathered, in bfloat16 two. Explicit updates lie like the
    # gradients: they are gathered, and then added.
    parts = (2 if moment_dtype == "bfloat16" else 1) + 8 * (axis_type == AxisType.Explicit)
    assert compiled.memory_analysis().temp_size_in_bytes <= parts * whole / 8 + 2048


def test_describe():
    """Path, place, how many devices hold the same part, bytes of a part, and totals.

    Another memory is not counted as that of the devices; what cannot be described is named.
    """
    params = _params(_mesh()) | {"alone": jnp.ones(3, jnp.int8), "empty": jnp.ones((0, 2))}
    table = sharding.describe(params)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["w"] == ("(8, 6)", "float32", "P(None, 'model')", "4", "96")
    assert rows["s"] == ("()", "float32", "P()", "8", "4")
    assert rows["alone"] == ("(3,)", "int8", "one device", "1", "3")
    assert rows["empty"][-2:] == ("1", "0")
    held = sum(int(row[-1]) for row in rows.values())
    assert [row[-1] for row in table.footer] == [
        str(held),
        str(sum(x.nbytes for x in params.values())),
    ]
    assert sharding.bytes_a_device(params) == held

    here = NamedSharding(AbstractMesh((8,), ("data",)), P("data"))
    host = here.with_memory_kind("pinned_host")
    tree = {
        "here": jax.ShapeDtypeStruct((16, 3), jnp.int8, sharding=here),
        "there": jax.ShapeDtypeStruct((16, 5), jnp.int8, sharding=host),
    }
    table = sharding.describe(tree)
    assert [row[3] for row in table.rows] == ["P('data')", "P('data'), pinned_host"]
    assert [row[-1] for row in table.footer] == ["6", "10", "128"]
    assert sharding.bytes_a_device(tree) == 6
    with pytest.raises(TypeError, match="a/x"):
        sharding.describe({"a": {"x": np.ones(3)}})
