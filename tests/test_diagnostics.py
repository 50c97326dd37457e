"""Diagnostics: each scalar against NumPy, in every format, jitted, grouped, and inside wrappers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates, x64

import adamaxw

pytestmark = pytest.mark.usefixtures("compile_fast")

_EPS = 1e-4
_FORMATS = (None, "bfloat16", "uint8")
_PARAMS = {
    "dense": {"w": jnp.linspace(-2.0, 2.0, 12).reshape(3, 4), "b": jnp.array([0.5])},
    "scale": jnp.array([3.0, 4.0]),
}
# Of 15 elements two have no gradient, and two have one above the range of uint8.
_GRADS = {
    "dense": {
        "w": jnp.array([[0, 1e-4, 1, -2], [1e9, 3, 0.1, 5], [1, -1, 2, -1e10]], jnp.float32),
        "b": jnp.array([0.0]),
    },
    "scale": jnp.array([1e-3, 7.0]),
}
_NAMES = ("update_norm", "param_norm", "update_to_weight", "at_floor")


def _after(opt, params=_PARAMS, grads=_GRADS, steps=3):
    """The updates, state and params after a few steps with the same gradients."""
    state, updates = opt.init(params), None
    for _ in range(steps):
        updates, state = opt.update(grads, state, params)
        params = apply_updates(params, updates)
    return updates, state, params


def _norm(tree):
    leaves = [np.asarray(x, np.complex128).ravel() for x in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves))


@pytest.mark.parametrize("moment_dtype", _FORMATS)
@pytest.mark.parametrize("jit", [False, True])
def test_each_scalar(moment_dtype, jit):
    """Norms as NumPy has them, fractions counted by hand, all float32 scalars."""
    opt = adamaxw.adamaxw(0.1, eps=_EPS, moment_dtype=moment_dtype)
    updates, state, params = _after(opt)

    def diagnose(*trees):
        return adamaxw.diagnostics(*trees, eps=_EPS)

    result = (jax.jit(diagnose) if jit else diagnose)(updates, state, params)
    assert set(result) == {*_NAMES, *(("saturated",) if moment_dtype == "uint8" else ())}
    assert all(x.dtype == jnp.float32 and x.shape == () for x in result.values())
    expected = {
        "update_norm": _norm(updates),
        "param_norm": _norm(params),
        "update_to_weight": _norm(updates) / _norm(params),
        "at_floor": 2 / 15,
        "saturated": 2 / 15,
    }
    for name, value in result.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_groups(moment_dtype):
    """The same for each key at the top, beside that of the whole tree."""
    opt = adamaxw.adamaxw(0.1, eps=_EPS, moment_dtype=moment_dtype)
    updates, state, params = _after(opt)
    result = adamaxw.diagnostics(updates, state, params, eps=_EPS, groups=True)
    whole = adamaxw.diagnostics(updates, state, params, eps=_EPS)
    assert {name: result[name] for name in whole} == whole
    assert set(result) == {p + name for p in ("", "dense/", "scale/") for name in whole}
    assert result["scale/at_floor"] == 0
    np.testing.assert_allclose(result["dense/at_floor"], 2 / 13, rtol=1e-6)
    np.testing.assert_allclose(result["scale/param_norm"], _norm(params["scale"]), rtol=1e-6)
    np.testing.assert_allclose(result["dense/update_norm"], _norm(updates["dense"]), rtol=1e-6)


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_a_norm_comes_to_the_floor(moment_dtype):
    """When the last gradient is forgotten, and not a step before; before the first step all are."""
    opt = adamaxw.adamaxw(0.1, b2=0.5, eps=_EPS, moment_dtype=moment_dtype)
    params = jnp.ones(8)
    state = opt.init(params)
    zeros = jnp.zeros(8)
    at_floor = [adamaxw.diagnostics(zeros, state, params, eps=_EPS)["at_floor"]]
    # 142 eps is 1.1 eps after seven halvings, and eps after eight.
    for grads in (jnp.full(8, 141 * _EPS), *[zeros] * 8):
        updates, state = opt.update(grads, state, params)
        at_floor.append(adamaxw.diagnostics(updates, state, params, eps=_EPS)["at_floor"])
    assert at_floor == [1, *[0] * 8, 1]


@pytest.mark.parametrize("moment_dtype", _FORMATS)
@pytest.mark.parametrize("param_rounding", ["nearest", "stochastic", "exact"])
def test_low_precision(moment_dtype, param_rounding):
    """bfloat16 parameters, and updates in either dtype, are summed in float32."""
    params = {"w": jnp.full((300, 300), 1.5, jnp.bfloat16)}
    opt = adamaxw.adamaxw(0.1, moment_dtype=moment_dtype, param_rounding=param_rounding)
    updates, state, params = _after(opt, params, jax.tree.map(jnp.ones_like, params))
    result = adamaxw.diagnostics(updates, state, params)
    # 90,000 terms are summed, with a rounding each in the worst order.
    np.testing.assert_allclose(result["param_norm"], _norm(params), rtol=1e-5)
    np.testing.assert_allclose(result["update_norm"], _norm(updates), rtol=1e-5)


def _wrappers():
    adam = adamaxw.adamaxw(0.1, eps=_EPS, moment_dtype="uint8")
    is_dense = {"dense": True, "scale": False}
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1e12), adam),
        "MultiSteps": optax.MultiSteps(adam, 1).gradient_transformation(),
        "apply_if_finite": optax.apply_if_finite(adam, 3),
        "inject_hyperparams": optax.inject_hyperparams(
            adamaxw.adamaxw, static_args=("moment_dtype",)
        )(0.1, eps=_EPS, moment_dtype="uint8"),
        "masked": optax.chain(
            optax.masked(adam, is_dense),
            optax.masked(adam, {"dense": False, "scale": True}),
        ),
        "partition": optax.partition(
            {True: adam, False: adamaxw.adamax(0.1, eps=_EPS, moment_dtype="uint8")}, is_dense
        ),
    }


@pytest.mark.parametrize("name", _wrappers())
@pytest.mark.usefixtures("standard_promotion")
def test_in_wrappers(name):
    """The state is found wherever it lies; several of them make one picture."""
    result = adamaxw.diagnostics(*_after(_wrappers()[name]), eps=_EPS, groups=True)
    np.testing.assert_allclose(result["at_floor"], 2 / 15, rtol=1e-6)
    np.testing.assert_allclose(result["saturated"], 2 / 15, rtol=1e-6)
    np.testing.assert_allclose(result["dense/saturated"], 2 / 13, rtol=1e-6)


def test_formats_of_several_states():
    """'saturated' is the fraction of all that train, where only some can be."""
    parts = {
        True: adamaxw.adamax(0.1, eps=_EPS),
        False: adamaxw.adamax(0.1, eps=_EPS, moment_dtype="uint8"),
    }
    grads = {"dense": _GRADS["dense"], "scale": jnp.array([1.0, 1e10])}
    opt = optax.partition(parts, {"dense": True, "scale": False})
    result = adamaxw.diagnostics(*_after(opt, grads=grads), eps=_EPS)
    np.testing.assert_allclose(result["saturated"], 1 / 15, rtol=1e-6)
    np.testing.assert_allclose(result["at_floor"], 2 / 15, rtol=1e-6)


def test_flax_nnx():
    """Variables in params and state count as the arrays in them."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamaxw.adamaxw(0.1, moment_dtype="uint8"), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((2, 4)))))(model)
        # Before 0.12.7 Flax returns none.
        updates = optimizer.update(model, grads) or grads
        params = nnx.state(model, nnx.Param)
        return adamaxw.diagnostics(updates, optimizer.opt_state, params, groups=True)

    result = step(model, optimizer)
    assert set(result) == {
        p + name for p in ("", "kernel/", "bias/") for name in (*_NAMES, "saturated")
    }
    np.testing.assert_allclose(result["kernel/param_norm"], _norm(model.kernel[...]), rtol=1e-6)
    assert result["at_floor"] == 0


def test_what_does_not_train_does_not_count():
    """Integers, None and empty leaves; complex numbers count by their modulus."""
    params = {
        "i": jnp.arange(5),
        "none": None,
        "empty": jnp.zeros((0, 3)),
        "z": jnp.array([3 + 4j, 0]),
    }
    grads = {**params, "z": jnp.array([1j, 0])}
    updates, state, _ = _after(adamaxw.adamax(0.5), params, grads, steps=1)
    result = adamaxw.diagnostics(updates, state, params, groups=True)
    assert result["param_norm"] == 5
    np.testing.assert_allclose(result["update_norm"], 0.5, rtol=1e-6)
    assert result["at_floor"] == 0.5
    assert set(result) == {*_NAMES, *("z/" + name for name in _NAMES)} | {
        "empty/" + name for name in _NAMES[:3]
    }
    assert result["empty/update_to_weight"] == 0
    assert not any(np.isnan(x) for x in result.values())


def test_zero_parameters():
    """A ratio of 0 without updates, and inf with them: never NaN."""
    params = jnp.zeros(3)
    opt = adamaxw.adamax(0.1)
    result = adamaxw.diagnostics(jnp.zeros(3), opt.init(params), params)
    assert result["update_to_weight"] == 0
    updates, state, _ = _after(opt, params, jnp.ones(3), steps=1)
    assert adamaxw.diagnostics(updates, state, params)["update_to_weight"] == np.inf


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_nan_shows(moment_dtype):
    """In the norms; a moment that is not finite counts neither as low nor as saturated."""
    params = jnp.ones(4)
    opt = adamaxw.adamax(0.1, moment_dtype=moment_dtype)
    result = adamaxw.diagnostics(*_after(opt, params, jnp.array([jnp.nan, 1, jnp.inf, 1])))
    assert np.isnan(result["update_norm"])
    assert result["at_floor"] == result.get("saturated", 0) == 0


def test_float64():
    """float64 parameters and hyperparameters give float32 scalars."""
    with x64():
        params = jnp.linspace(1.0, 2.0, 4, dtype=jnp.float64)
        after = _after(adamaxw.adamax(0.1), params, jnp.array([0.0, 1.0, 2.0, 3.0]))
        result = adamaxw.diagnostics(*after, eps=jnp.float64(1e-8))
        assert {x.dtype for x in result.values()} == {np.dtype("float32")}
        np.testing.assert_allclose(result["param_norm"], _norm(after[2]), rtol=1e-6)
        np.testing.assert_allclose(result["update_norm"], _norm(after[0]), rtol=1e-6)
        assert result["at_floor"] == 0.25


def test_keys_of_groups():
    """Each key at the top is a group, whatever is in it; a lone array has none."""
    tree = {"a": {"x": jnp.ones(2)}, "a/b": jnp.ones(3), 3: jnp.ones(1)}
    tree = {str(k): v for k, v in tree.items()}
    updates, state, params = _after(adamaxw.adamax(0.1), tree, tree, steps=1)
    result = adamaxw.diagnostics(updates, state, params, groups=True)
    assert set(result) == {p + name for p in ("", "a/", "a/b/", "3/") for name in _NAMES}
    np.testing.assert_allclose(result["a/b/update_norm"], _norm(updates["a/b"]), rtol=1e-6)
    lone = _after(adamaxw.adamax(0.1), jnp.ones(2), jnp.ones(2))
    assert set(adamaxw.diagnostics(*lone, groups=True)) == set(_NAMES)


def test_groups_that_the_state_does_not_have():
    """`optax.flatten` keeps one vector for all: no fraction of a group is made up from it."""
    tree = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    after = _after(optax.flatten(adamaxw.adamax(0.1)), tree, tree)
    result = adamaxw.diagnostics(*after, groups=True)
    assert result["at_floor"] == 0.5
    assert "b/update_norm" in result
    assert "b/at_floor" not in result


def test_more_elements_than_an_int32():
    """Leaves of 2^31 elements and more."""
    params = {"w": jax.ShapeDtypeStruct((70_000, 70_000), jnp.bfloat16)}
    opt = adamaxw.adamax(0.1, moment_dtype="uint8")
    state = jax.eval_shape(opt.init, params)
    assert jax.eval_shape(adamaxw.diagnostics, params, state, params)["at_floor"].shape == ()


def test_debug_nans():
    """A ratio of zeros is 0 without a NaN on the way."""
    zeros = jnp.zeros(2)
    state = adamaxw.adamax(0.1).init(zeros)
    with jax.debug_nans(True):
        assert adamaxw.diagnostics(zeros, state, zeros)["update_to_weight"] == 0


def test_sharded():
    """Scalars of the whole arrays, wherever their shards lie."""
    mesh = jax.make_mesh((8,), ("x",))
    spread = NamedSharding(mesh, P("x"))
    params = jnp.linspace(-1.0, 1.0, 64)
    grads = jnp.where(jnp.arange(64) % 4 == 0, 0.0, 1.0)
    opt = adamaxw.adamaxw(0.1, moment_dtype="uint8")
    alone = adamaxw.diagnostics(*_after(opt, params, grads))
    params, grads = (jax.device_put(x, spread) for x in (params, grads))
    result = jax.jit(adamaxw.diagnostics)(*_after(opt, params, grads))
    for name, value in alone.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6)
    assert result["at_floor"] == 0.25


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": optax.EmptyState()}, TypeError, "state must .* none in this EmptyState"),
        ({"state": optax.adamaxw(0.1).init(_PARAMS)}, TypeError, "none in this tuple"),
        ({"params": {"w": [jnp.ones(2), "text"]}}, TypeError, r"params\['w'\]\[1\] must .* 'text'"),
        ({"updates": {"f": jnp.ones}}, TypeError, r"updates\['f'\] must be an array"),
        ({"updates": None}, TypeError, "updates must be .* got None"),
        ({"eps": 0}, ValueError, "eps must satisfy"),
        ({"eps": jnp.bfloat16(1e-3)}, TypeError, "eps came as bfloat16"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    """With the argument, what came, and the path."""
    opt = adamaxw.adamaxw(0.1)
    arguments = {"updates": _PARAMS, "state": opt.init(_PARAMS), "params": _PARAMS} | change
    with pytest.raises(error, match=message):
        adamaxw.diagnostics(**arguments)
