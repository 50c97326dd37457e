"""Every format and rounding, for each kind of parameters, wrapper and place.

What broke the optimizer once is a row here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import AXIS_TYPES, EVERY_MOMENT_DTYPE, PAIRS, WRAPPERS, run, states_in
from equality import assert_equal
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adamaxw
from adamaxw import masks, moments, sharding


class Converting:
    """Converts what it is given, as the `MyTree` of JAX's page on custom pytrees."""

    def __init__(self, a, b):
        self.a, self.b = jnp.asarray(a), jnp.asarray(b)


class Refusing:
    """Refuses whatever is not an array, and arrays that do not go together."""

    def __init__(self, a, b):
        if not isinstance(a, jax.Array) or not isinstance(b, jax.Array) or a.shape != b.shape:
            raise TypeError(f"two arrays of one shape are needed, got {a!r} and {b!r}")
        self.a, self.b = a, b


for _cls in (Converting, Refusing):
    jax.tree_util.register_pytree_node(
        _cls, lambda x: ((x.a, x.b), None), lambda _, children, _cls=_cls: _cls(*children)
    )


def _mesh(axis_type, shape=(8,), axes="x", devices=None):
    return jax.make_mesh(shape, tuple(axes), axis_types=(axis_type,) * len(shape), devices=devices)


def _put(tree, mesh):
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("x"))), tree)


def _arrays(dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(8, 3)), d) for d in (dtype, jnp.float32)]


PARAMS = {
    "dict": lambda dtype: dict(zip("ab", _arrays(dtype), strict=True)),
    "converting": lambda dtype: Converting(*_arrays(dtype)),
    "refusing": lambda dtype: {"x": Refusing(*_arrays(dtype))},
}
PLACES = {
    "one device": lambda tree: tree,
    "automatic mesh": lambda tree: _put(tree, _mesh(AxisType.Auto)),
    "explicit mesh": lambda tree: _put(tree, _mesh(AxisType.Explicit)),
}
ROWS = [
    ("dict", "bare", "automatic mesh"),
    ("dict", "bare", "explicit mesh"),
    ("dict", "partition, one group", "one device"),
    ("converting", "bare", "one device"),
    ("refusing", "chain", "automatic mesh"),
    ("dict", "MultiSteps", "one device"),
]


_train = functools.partial(run, factors=[1.0, 0.3, -0.5, 2.0, 0.0, -1.0])


def _types(tree):
    """As lists: the classes take arrays alone."""
    return jax.tree.structure(tree), [jax.typeof(x) for x in jax.tree.leaves(tree)]


def _dtypes(tree):
    return jax.tree.structure(tree), [(x.dtype, x.shape) for x in jax.tree.leaves(tree)]


@pytest.mark.usefixtures("compile_fast", "standard_promotion")
@pytest.mark.parametrize(
    ("moment_dtype", "param_rounding", "row"),
    [
        pytest.param(*pair, row, marks=() if (j - 4 * i) % 9 in (0, 4) else pytest.mark.slow)
        for i, row in enumerate(ROWS)
        for j, pair in enumerate(PAIRS)
    ],
    ids=str,
)
def test_trains_as_a_list_of_the_same_arrays(moment_dtype, param_rounding, row):
    """The same bits whatever the class, wrapper or place; everything reads the state.

    Without a wrapper the list trains outside jit, to the same bits as under it.
    """
    params, wrapper, place = row
    if (wrapper, param_rounding) == ("MultiSteps", "exact") and optax.__version__ == "0.2.6":
        pytest.skip("before 0.2.7 optax.MultiSteps changes the dtype of what it has accumulated")
    make = functools.partial(
        adamaxw.adamaxw, moment_dtype=moment_dtype, param_rounding=param_rounding
    )
    tree = PLACES[place](PARAMS[params](jnp.bfloat16))
    twin = jax.tree.leaves(PARAMS[params](jnp.bfloat16))
    opt = WRAPPERS[wrapper](make)
    state = opt.init(tree)
    got, after = _train(opt, tree, state=state)
    expected, _ = _train(opt, twin, compiled=wrapper != "bare")
    assert _types(got) == _types(tree)
    assert _types(after) == _types(state)
    assert_equal(*([np.asarray(x) for x in jax.tree.leaves(t)] for t in (got, expected)))

    (inner,) = states_in(after)
    assert jax.tree.structure(moments.unpack(inner).mu) == jax.tree.structure(tree)
    assert _types(moments.convert(after, opt.init(tree))) == _types(after)
    moments.master_params(got, inner)
    theirs = optax.adamaxw(1e-2).init(tree)
    # Either way leaves lie where those of the first lie.
    if inner.residual is None:
        assert _dtypes(moments.convert(inner, theirs)) == _dtypes(theirs)
    assert _dtypes(moments.convert(theirs, inner)) == _dtypes(inner)
    assert np.isfinite(adamaxw.diagnostics(got, after, got)["update_norm"])
    assert masks.describe(tree, masks.rank(2)).rows

    assert _types(moments.restart(after)) == _types(state)


@pytest.mark.parametrize("params", PARAMS)
def test_shardings_of_a_state_in_any_class(params):
    """However deep the class lies; one sharding for a whole node where it takes no shardings."""
    mesh = _mesh(AxisType.Auto)
    tree = {"a": [PARAMS[params](jnp.bfloat16)], "z": _arrays(jnp.float32)[0]}
    tree = _put(tree, mesh) | {"z": jax.device_put(tree["z"], NamedSharding(mesh, P()))}
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8", param_rounding="exact")
    found = sharding.of_state(optax.chain(optax.trace(0.9), opt), tree)
    for state in (found[0].trace, found[1].mu, found[1].nu, found[1].residual):
        assert {x.spec for x in jax.tree.leaves(state["a"])} == {P("x")}
        assert state["z"].spec == P()


@EVERY_MOMENT_DTYPE
def test_init_from_abstract_parameters_on_a_mesh(moment_dtype):
    """On the mesh that is set, with explicit axes; with automatic ones and none set, somewhere."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding="stochastic")

    def moments_of(params):
        return jax.tree.leaves(opt.init(params)[1:3])

    with jax.set_mesh(_mesh(AxisType.Explicit)):
        params = jax.eval_shape(lambda: jnp.zeros((8, 8), out_sharding=P("x")))
        assert [x.sharding.spec for x in moments_of(params)] == [P("x", None)] * 2
    mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    assert [x.shape for x in moments_of(params)] == [(8, 8)] * 2


@AXIS_TYPES
def test_two_meshes_in_one_tree(axis_type):
    """One scale cannot be on both, which is refused; float32, which has none, trains eagerly."""
    meshes = _mesh(axis_type), _mesh(axis_type, (2, 4), "xy", devices=jax.devices()[::-1])
    alone = {"a": jnp.ones((8, 8)), "b": jnp.ones((4, 3))}
    params = {name: _put(x, mesh) for (name, x), mesh in zip(alone.items(), meshes, strict=True)}
    for moment_dtype in ("bfloat16", "uint8"):
        with pytest.raises(ValueError, match=r"\['a'\].*\['b'\]"):
            adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype).init(params)
    opt = adamaxw.adamaxw(1e-2)
    got, expected = (_train(opt, p, compiled=False)[0] for p in (params, alone))
    assert_equal(got, expected)
