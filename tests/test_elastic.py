"""Saved on one mesh, restored on another: training goes on as if it had never stopped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, assert_equal_across_meshes
from gradients import gradients
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates
from orbax.checkpoint import v1 as ocp

import adamaxw
from adamaxw import sharding

_SHAPES = {"w": (16, 8), "b": (8,), "odd": (3,), "s": ()}
_STEPS = 4
# Devices, axes, which dimension of a parameter is split over which axis, and the axis over which
# the state is spread besides.
_MESHES = {
    "8, ZeRO-1": ((8,), ("data",), (), "data"),
    "4, sharded": ((4,), ("data",), ("data",), ()),
    "2, other axis": ((2,), ("model",), (None, "model"), ()),
    "2 x 2, both": ((2, 2), ("data", "model"), (None, "model"), "data"),
}


def _abstract(opt, dtype, mesh):
    """Shapes, dtypes and shardings of a run on a mesh."""
    shape, axes, spec, data_axis = _MESHES[mesh]
    mesh = jax.make_mesh(shape, axes, devices=jax.devices()[: np.prod(shape)])

    def place(shape):
        fits = len(shape) == 2
        where = NamedSharding(mesh, P(*spec) if fits else P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    params = {name: place(shape) for name, shape in _SHAPES.items()}
    found = sharding.of_state(opt, params, data_axis=data_axis)
    return params, jax.jit(opt.init, out_shardings=found).eval_shape(params)


def _first(opt, abstract):
    params = {
        name: jnp.asarray(gradients("normal", 1, shape, seed=1)[0])
        for name, shape in _SHAPES.items()
    }
    params = jax.tree.map(
        lambda p, a: jax.device_put(p.astype(a.dtype), a.sharding), params, abstract[0]
    )
    init = jax.jit(opt.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract[1]))
    return params, init(params)


def _train(opt, run, steps):
    where = jax.tree.map(lambda x: x.sharding, run)

    @functools.partial(jax.jit, out_shardings=where, donate_argnums=0)
    def step(run, grads):
        params, state = run
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    columns = {name: gradients("normal", 20, shape) for name, shape in _SHAPES.items()}
    for i in steps:
        run = step(run, {name: column[i] for name, column in columns.items()})
    return run


@pytest.mark.parametrize(
    ("moment_dtype", "param_rounding", "dtype"),
    [
        (None, "nearest", jnp.float32),
        ("bfloat16", "stochastic", jnp.bfloat16),
        ("uint8", "exact", jnp.bfloat16),
    ],
)
def test_from_mesh_to_mesh(moment_dtype, param_rounding, dtype, tmp_path):
    """From 8 devices to 4, to 2 along another axis, to 4 again: the end is that of staying on 8.

    What is restored has every bit of what was saved.
    """
    opt = optax.chain(
        optax.clip(10.0),
        adamaxw.adamaxw(
            optax.linear_schedule(0.0, 1e-2, 6),
            weight_decay=0.1,
            moment_dtype=moment_dtype,
            param_rounding=param_rounding,
        ),
    )
    run, steps = None, 0
    for i, mesh in enumerate(_MESHES):
        abstract = _abstract(opt, dtype, mesh)
        if run is None:
            run = _first(opt, abstract)
        else:
            saved = jax.tree.map(np.asarray, run)
            ocp.save(tmp_path / str(i), run)
            run = ocp.load(tmp_path / str(i), abstract)
            assert_equal(jax.tree.map(np.asarray, run), saved)
        assert jax.tree.map(lambda x: x.sharding, run) == jax.tree.map(
            lambda x: x.sharding, abstract
        )
        run = _train(opt, run, range(steps, steps + _STEPS))
        steps += _STEPS

    stayed = _train(opt, _first(opt, _abstract(opt, dtype, next(iter(_MESHES)))), range(steps))
    assert_equal_across_meshes(run, stayed)
