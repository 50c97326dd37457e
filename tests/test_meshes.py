"""On meshes of eight devices, with automatic and with explicit axes."""

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import WITHOUT_FUSED_MULTIPLY_ADD, assert_equal_across_meshes, types_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamaxw

_OPT = adamaxw.adamaxw(1e-2, weight_decay=0.1)
_SPECS = {"w": P("data", "model"), "b": P("model"), "s": P()}
_PARAMS = {
    "w": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8),
    "b": np.linspace(1, 2, 4, dtype=np.float32),
    "s": np.float32(2),
}


def _placed(axis_type, tree=_PARAMS):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in _SPECS.items()}
    return jax.device_put(tree, shardings), shardings


def _assert_sharded_like(state, shardings):
    for moment in (state.mu, state.nu):
        for name, sharding in shardings.items():
            assert moment[name].sharding.is_equivalent_to(sharding, moment[name].ndim), name
    everywhere = NamedSharding(shardings["w"].mesh, P())
    assert state.count.sharding.is_equivalent_to(everywhere, 0)


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="XLA can be told to leave out fused multiply-add on x86 alone",
)
def test_one_device_and_a_mesh_are_the_same_bit_for_bit():
    """Where the compiler computes the formula as written, with explicit axes in every format.

    With automatic axes test_example_distributed.py compares every format and rounding.
    """
    names = (
        "test_meshes.py::test_training_on_a_mesh",
        "test_low_precision.py::test_eight_devices_are_one",
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} {WITHOUT_FUSED_MULTIPLY_ADD}"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "Explicit", *names],
        cwd=Path(__file__).parent,
        env=os.environ | {"XLA_FLAGS": flags},
        check=True,
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_training_on_a_mesh(axis_type):
    """The state follows the params, keeps its types, and is that of one device."""
    params, shardings = _placed(axis_type)
    state = _OPT.init(params)
    _assert_sharded_like(state, shardings)
    types = types_of((params, state))
    alone = jax.tree.map(jnp.asarray, _PARAMS)
    state_alone = _OPT.init(alone)

    @jax.jit
    def step(params, state):
        updates, state = _OPT.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(5):
        params, state = step(params, state)
        alone, state_alone = step(alone, state_alone)
        assert types_of((params, state)) == types
    _assert_sharded_like(state, shardings)
    assert_equal_across_meshes((params, state), (alone, state_alone))


def test_compiled_init_under_a_mesh():
    """With jax.set_mesh, as explicit axes want it: the state is born sharded."""
    params, shardings = _placed(AxisType.Explicit)
    with jax.set_mesh(shardings["w"].mesh):
        state = jax.jit(_OPT.init)(params)
        _assert_sharded_like(state, shardings)
        _, new = jax.jit(_OPT.update)(params, state, params)
    assert types_of(new) == types_of(state)


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_compiles_once_on_a_mesh(axis_type, abstract):
    """Params, moments and count lie where the compiled step leaves them, from the start."""
    params, _ = _placed(axis_type)
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )
    state = _OPT.init(shapes if abstract else params)
    # A function of its own: jit keeps one cache for each.
    step = jax.jit(lambda *args: _OPT.update(*args))
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


def test_explicit_types_in_loops():
    """Under scan the sharding types of the carry stay as they are."""
    params, _ = _placed(AxisType.Explicit)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = _OPT.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, _OPT.init(params)), length=3)[0]

    trained, state = train(params)
    assert types_of(trained) == types_of(params)
    assert types_of(state.mu) == types_of(params)


def test_abstract_params_with_shardings():
    """From ShapeDtypeStruct with shardings, the state is allocated where params will be."""
    _, shardings = _placed(AxisType.Auto)
    abstract = {
        name: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=shardings[name])
        for name, p in _PARAMS.items()
    }
    _assert_sharded_like(_OPT.init(abstract), shardings)


def test_inside_shard_map():
    """The update is local: under shard_map it works on the shards, types of variance included."""
    params, shardings = _placed(AxisType.Auto)
    mesh = shardings["w"].mesh
    state = _OPT.init(params)
    specs = adamaxw.AdamaxState(P(), _SPECS, _SPECS)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(_SPECS, specs), out_specs=(_SPECS, specs)
    )
    def step(params, state):
        updates, state = _OPT.update(params, state, params)
        return optax.apply_updates(params, updates), state

    expected_updates, expected = _OPT.update(params, state, params)
    stepped, new = step(params, state)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, new, expected)
    jax.tree.map(close, stepped, optax.apply_updates(params, expected_updates))


def test_params_on_several_meshes_leave_the_count_free():
    """With params on different devices no place is right for all, and none is forced."""
    first, second = jax.devices()[:2]
    params = {"a": jax.device_put(jnp.ones(2), first), "b": jax.device_put(jnp.ones(2), second)}
    state = _OPT.init(params)
    updates, state = _OPT.update(params, state, params)
    assert updates["a"].devices() == {first}
    assert updates["b"].devices() == {second}
