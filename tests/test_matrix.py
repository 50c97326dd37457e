"""One registry of (parameters, wrapper, place), each tried in every format and rounding.

A kind of parameters, wrapper or place that broke the optimizer once is a row here.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates

import adamaxw
from adamaxw import masks, moments, sharding

_FORMATS = list(itertools.product((None, "bfloat16", "uint8"), ("nearest", "stochastic", "exact")))


class Converting:
    """Converts what it is given, as the `MyTree` of JAX's page on custom pytrees."""

    def __init__(self, a, b):
        self.a, self.b = jnp.asarray(a), jnp.asarray(b)


class Refusing:
    """Refuses whatever is no array, and arrays that do not go together."""

    def __init__(self, a, b):
        if not isinstance(a, jax.Array) or not isinstance(b, jax.Array) or a.shape != b.shape:
            raise TypeError(f"two arrays of one shape are needed, got {a!r} and {b!r}")
        self.a, self.b = a, b


for _cls in (Converting, Refusing):
    jax.tree_util.register_pytree_node(
        _cls, lambda x: ((x.a, x.b), None), lambda _, children, _cls=_cls: _cls(*children)
    )


def _mesh(axis_type, shape=(8,), axes=("x",)):
    return jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(shape))


def _arrays(dtype):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(8, 3)), d) for d in (dtype, jnp.float32))
    return a, b


def _dict(dtype):
    a, b = _arrays(dtype)
    return {"a": a, "b": b}


PARAMS = {
    "dict": _dict,
    "converting": lambda dtype: Converting(*_arrays(dtype)),
    "refusing": lambda dtype: {"x": Refusing(*_arrays(dtype))},
}
WRAPPERS = {
    "bare": lambda opt: opt,
    "chain": lambda opt: optax.chain(optax.clip_by_global_norm(1.0), opt),
    "partition": lambda opt: optax.partition({"all": opt}, "all"),
    "MultiSteps": lambda opt: optax.MultiSteps(opt, 2).gradient_transformation(),
}
PLACES = {
    "one device": lambda tree: tree,
    "automatic mesh": lambda tree: _put(tree, _mesh(AxisType.Auto)),
    "explicit mesh": lambda tree: _put(tree, _mesh(AxisType.Explicit)),
}
ROWS = [
    ("dict", "bare", "automatic mesh"),
    ("dict", "bare", "explicit mesh"),
    ("dict", "partition", "one device"),
    ("converting", "bare", "one device"),
    ("refusing", "chain", "automatic mesh"),
    ("dict", "MultiSteps", "one device"),
]


def _put(tree, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), tree)


def _train(opt, params, state, steps=4, compiled=True):
    update = jax.jit(opt.update) if compiled else opt.update
    for _ in range(steps):
        grads = jax.tree.map(lambda p: (p + 1).astype(p.dtype), params)
        updates, state = update(grads, state, params)
        params = apply_updates(params, updates)
    return params, state


def _types(tree):
    return jax.tree.structure(tree), [jax.typeof(x) for x in jax.tree.leaves(tree)]


def _dtypes(tree):
    return jax.tree.structure(tree), [(x.dtype, x.shape) for x in jax.tree.leaves(tree)]


def _states(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, adamaxw.AdamaxState))
    return [x for x in leaves if isinstance(x, adamaxw.AdamaxState)]


@pytest.mark.usefixtures("compile_fast", "standard_promotion")
@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _FORMATS)
@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_trains_as_a_list_of_the_same_arrays(row, moment_dtype, param_rounding):
    """Same bits whatever the class, wrapper or place; types stay; zeros and restarts train too."""
    params, wrapper, place = row
    if (wrapper, param_rounding) == ("MultiSteps", "exact") and optax.__version__ == "0.2.6":
        pytest.skip("before 0.2.7 optax.MultiSteps changes the dtype of what it has accumulated")
    opt = adamaxw.adamaxw(1e-2, mask=True, moment_dtype=moment_dtype, param_rounding=param_rounding)
    tree = PLACES[place](PARAMS[params](jnp.bfloat16))
    twin = jax.tree.leaves(PARAMS[params](jnp.bfloat16))
    wrapped, listed = (WRAPPERS[wrapper](opt) for _ in range(2))
    state = wrapped.init(tree)
    got, after = _train(wrapped, tree, state)
    expected, _ = _train(listed, twin, listed.init(twin))
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert _types(after) == _types(state)
    assert_equal(*([np.asarray(x) for x in jax.tree.leaves(t)] for t in (got, expected)))

    (inner,) = _states(after)
    unpacked = moments.unpack(inner)
    assert jax.tree.structure(unpacked.mu) == jax.tree.structure(tree)
    assert _types(moments.convert(after, wrapped.init(tree))) == _types(after)
    moments.master_params(got, inner)
    theirs = optax.adamaxw(1e-2).init(tree)
    # Either way leaves lie where those of the first lie.
    if inner.residual is None:
        assert _dtypes(moments.convert(inner, theirs)) == _dtypes(theirs)
    assert _dtypes(moments.convert(theirs, inner)) == _dtypes(inner)
    scalars = adamaxw.diagnostics(got, after, got)
    assert np.isfinite(scalars["update_norm"])
    assert masks.describe(tree, masks.rank(2)).rows

    for fresh in (jax.tree.map(jnp.zeros_like, after), moments.restart(after)):
        again, last = _train(wrapped, tree, fresh)
        assert _types(last) == _types(state)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(got), strict=True):
            # With other noise, each step may round a parameter to the other neighbour.
            rtol = 2.0**-7 if param_rounding == "stochastic" else 1e-7
            np.testing.assert_allclose(
                np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.03, rtol=rtol
            )


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _FORMATS)
@pytest.mark.parametrize("params", PARAMS)
def test_shardings_of_a_state_in_any_class(params, moment_dtype, param_rounding):
    """One for a whole node, where its class takes no shardings."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding=param_rounding)
    tree = PLACES["automatic mesh"](PARAMS[params](jnp.bfloat16))
    shardings = jax.tree.leaves(sharding.of_state(opt, tree).nu)
    assert {x.spec for x in shardings} == {P("x")}


@pytest.mark.parametrize("params", PARAMS)
def test_shardings_around_any_class(params):
    """However deep it lies, and in the states of others beside ours."""
    mesh = _mesh(AxisType.Auto)
    tree = {"a": [PARAMS[params](jnp.float32)], "z": _arrays(jnp.float32)[0]}
    tree = _put(tree, mesh) | {"z": jax.device_put(tree["z"], NamedSharding(mesh, P()))}
    opt = optax.chain(optax.trace(0.9), adamaxw.adamaxw(1e-2))
    found = sharding.of_state(opt, tree)
    for state in (found[0].trace, found[1].mu, found[1].nu):
        assert {x.spec for x in jax.tree.leaves(state["a"])} == {P("x")}
        assert state["z"].spec == P()


@pytest.mark.parametrize("moment_dtype", [None, "bfloat16", "uint8"])
def test_init_from_abstract_parameters_on_a_mesh(moment_dtype):
    """On the mesh that is set, with explicit axes; with automatic ones and none set, somewhere."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding="stochastic")
    slots = {"step": 7, "exp_avg": np.ones((8, 8)), "exp_inf": np.ones((8, 8))}

    def read(params):
        return moments.from_torch({"state": {0: slots}}, {"w": params}, {"w": 0}).mu["w"]

    with jax.set_mesh(_mesh(AxisType.Explicit)):
        params = jax.eval_shape(lambda: jnp.zeros((8, 8), out_sharding=P("x")))
        state = opt.init(params)
        for x in (state.mu, state.nu, read(params)):
            assert x.sharding.spec == P("x", None)
        opt.update(jnp.zeros_like(params), state, jnp.zeros_like(params))
    mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    assert opt.init(params).mu.shape == read(params).shape == (8, 8)


@pytest.mark.parametrize("moment_dtype", ["bfloat16", "uint8"])
def test_two_meshes_in_one_tree_are_refused(moment_dtype):
    """One scale cannot be on both; float32, which has none, trains."""
    meshes = _mesh(AxisType.Auto, (2, 4), ("x", "y")), _mesh(AxisType.Auto, (2, 2, 2), tuple("xyz"))
    params = {name: _put(jnp.ones((8, 8)), mesh) for name, mesh in zip("ab", meshes, strict=True)}
    with pytest.raises(ValueError, match=r"\['a'\].*\['b'\].*optax.partition"):
        adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype).init(params)
    opt = adamaxw.adamaxw(1e-2)
    _train(opt, params, opt.init(params), compiled=False)
