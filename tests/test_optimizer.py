"""What the transformation keeps fixed, and what it does with every kind of leaf."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import REFUSED, run
from equality import assert_equal, types_of
from modes import x64
from oracle import Oracle

import adamaxw

pytestmark = pytest.mark.usefixtures("compile_fast")

_OPT = adamaxw.adamaxw(1e-2, weight_decay=0.1)


def test_signature_begins_with_the_documented_arguments():
    """Names, order and defaults are those of optax.adamaxw; what is ours is keyword-only."""
    ours = list(inspect.signature(adamaxw.adamaxw).parameters.values())
    theirs = list(inspect.signature(optax.adamaxw).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_adamax_is_adamaxw_without_decay():
    """With or without params, and both ignore extra arguments that are meant for others."""
    params, grads = jnp.linspace(1.0, 2.0, 5), jnp.linspace(-1.0, 1.0, 5)
    plain, decoupled = adamaxw.adamax(0.1), adamaxw.adamaxw(0.1, weight_decay=0.0)
    state = plain.init(params)
    expected = decoupled.update(grads, state, params, value=1.0)
    for opt in (plain, decoupled):
        assert isinstance(opt, optax.GradientTransformationExtraArgs)
    assert_equal(plain.update(grads, state), expected)
    assert_equal(plain.update(grads, state, params, value=1.0, grad=params), expected)


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("complex64", "complex64"),
    ],
)
def test_state_types_are_fixed_at_init(param_dtype, grad_dtype):
    """Structure, shapes, dtypes and weak types: eager, jit, scan, cond and eval_shape."""
    params = {"w": jnp.ones((2, 3), param_dtype), "b": jnp.ones((), param_dtype)}
    grads = jax.tree.map(lambda p: p.astype(grad_dtype), params)
    state = _OPT.init(params)

    def step(state):
        return _OPT.update(grads, state, params)[1]

    for found in (
        step(state),
        jax.jit(step)(state),
        jax.lax.scan(lambda s, _: (step(s), None), state, length=2)[0],
        jax.lax.cond(state.count == 0, step, lambda s: s, state),
        jax.jit(_OPT.init)(params),
        jax.eval_shape(_OPT.init, params),
        _OPT.init(jax.eval_shape(lambda: params)),
    ):
        assert types_of(found) == types_of(state)


def test_python_and_numpy_leaves():
    """Params and gradients may be Python numbers, NumPy arrays, and objects with __jax_array__."""

    class Wrapped:
        dtype, shape = jnp.dtype("float32"), (2,)

        def __jax_array__(self):
            return jnp.array([3.0, -1.0])

    params = {"a": 1.0, "b": np.ones(2), "c": np.float32(3), "d": Wrapped()}
    state = _OPT.init(params)
    updates, new = _OPT.update(params, state, params)
    assert types_of(new) == types_of(state)
    for name, p in params.items():
        expected = Oracle(jnp.asarray(p), lr=1e-2, wd=0.1).step(jnp.asarray(p))
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_state_can_be_donated(wrap):
    """No buffer occurs twice in a state, so that all can be given away, and all are reused."""
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64)), "s": jnp.ones(())}
    state = wrap(_OPT.init)(params)
    step = jax.jit(lambda *args: _OPT.update(*args), donate_argnums=1)
    for _ in range(3):
        leaves = jax.tree.leaves(state)
        assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
        _, state = step(params, state, params)
        assert all(x.is_deleted() for x in leaves)
    assert step._cache_size() == 1


def test_vmap_over_hyperparameters():
    """Every hyperparameter may be a traced scalar; each lane trains as if alone."""
    lanes = [[1e-3, 0.1], [0.0, 0.9], [0.0, 1.0], [1e-8, 1e-4], [0.0, 1.0]]
    start = jnp.linspace(-1.0, 1.0, 6)

    def train(*values):
        return run(adamaxw.adamaxw(*values), start, [1.0, -0.5, 0.1] * 5, compiled=False)[0]

    many = jax.vmap(train)(*map(jnp.asarray, lanes))
    alone = [train(*values) for values in zip(*lanes, strict=True)]
    np.testing.assert_allclose(many, alone, rtol=1e-5, atol=1e-7)


def test_differentiable_at_the_bounds():
    """The gradient of a loss after training agrees with differences, at the bounds too."""

    @jax.jit
    def loss(lr, b1, b2, wd):
        params = jnp.array([1.0, -2.0])
        opt = adamaxw.adamaxw(lr, b1, b2, weight_decay=wd)
        state = opt.init(params)
        for scale in (2.0, 1.0, 0.1):
            updates, state = opt.update(scale * params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    values = np.array([0.1, 0.0, 0.5, 0.0])
    derivatives = jax.grad(loss, (0, 1, 2, 3))(*values)
    for derivative, step in zip(derivatives, 5e-3 * np.eye(4), strict=True):
        difference = (loss(*values + step) - loss(*values)) / 5e-3
        np.testing.assert_allclose(derivative, difference, rtol=5e-2, atol=1e-3)


def test_schedules_are_given_the_number_of_updates_done():
    """0 at the first update; outside jit they may be any Python function of that number."""
    opt = adamaxw.adamax(lambda count: 0.1 if count < 1 else 0.2, b1=0.0)
    state = opt.init(jnp.zeros(2))
    for rate in (0.1, 0.2):
        updates, state = opt.update(jnp.ones(2), state)
        np.testing.assert_allclose(updates, -rate, rtol=1e-6)


def test_none_in_params_and_gradients():
    """None, MaskedNode and empty containers in params stay.

    Where a gradient is None, of a leaf or a whole subtree: no update, no decay, the same moments.
    """
    for params in ({}, {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode(), "d": ()}):
        state = _OPT.init(params)
        updates, new = _OPT.update(params, state, params)
        assert types_of((updates, new)) == types_of((params, state))

    params = {"trained": jnp.ones(2), "frozen": {"w": jnp.ones(3)}}
    state = _OPT.init(params)
    for frozen in ({"w": None}, None):
        updates, new = _OPT.update({"trained": jnp.ones(2), "frozen": frozen}, state, params)
        assert updates["frozen"] == frozen
        assert np.all(updates["trained"] < 0)
        for tree, expected in ((new.mu, state.mu), (new.nu, state.nu)):
            assert_equal(tree["frozen"], expected["frozen"])
        assert types_of(new) == types_of(state)
        state = new
    applied = eqx.apply_updates(params, updates | {"frozen": {"w": None}})
    assert_equal(applied["frozen"], params["frozen"])


def test_float64_beside_float32():
    """Under x64 each parameter trains in its own precision, whatever that of hyperparameters."""
    values = np.random.default_rng(0).normal(size=8)
    dtypes = {"double": "float64", "single": "float32", "complex": "complex128"}
    with x64():
        params = {name: jnp.asarray(values, dtype) for name, dtype in dtypes.items()}
        rates = jnp.float32(1e-2), jnp.float32(0.5)
        for lr, b1 in (map(float, rates), rates, (lambda t: jnp.float32(1e-2), 0.5)):
            opt = adamaxw.adamaxw(lr, b1, weight_decay=jnp.float64(0.1))
            state = opt.init(params)
            assert {name: x.dtype for name, x in state.mu.items()} == dtypes
            assert {name: x.dtype for name, x in state.nu.items()} == dtypes | {
                "complex": "float64"
            }
            updates, new = jax.jit(opt.update)(params, state, params)
            assert types_of((updates, new)) == types_of((params, state))
            expected = Oracle(values, float(rates[0]), 0.5, wd=0.1).step(values)
            np.testing.assert_allclose(updates["double"], expected, rtol=1e-12)


_PARAMS = {"w": jnp.ones((2, 3)), "layers": [jnp.ones(2), jnp.ones(3)]}
_STATE = _OPT.init(_PARAMS)


@pytest.mark.parametrize("leaf", ["text", object(), jnp.sum, jax.random.key(0)])
def test_leaves_that_are_no_numbers_are_refused_at_init(leaf):
    """The error names the path."""
    with pytest.raises(TypeError, match=r"params\['layer'\]\[1\]"):
        _OPT.init({"layer": [jnp.ones(2), leaf]})


@pytest.mark.parametrize("which", ["gradients", "params"])
@pytest.mark.parametrize(
    ("path", "bad"),
    [
        (r"\['w'\]", jnp.ones((3, 2))),
        (r"\['w'\]", [jnp.ones(2)]),
        (r"\['layers'\]\[1\]", [jnp.ones(2), jnp.ones(3, jnp.complex64)]),
        (r"\['layers'\]\[1\]", [jnp.ones(2), jnp.ones(3, jnp.int32)]),
        (r"\['layers'\]", (jnp.ones(2), jnp.ones(3))),
        (r"\['layers'\]", [jnp.ones(2)]),
        (r"\['layers'\]", jnp.ones(2)),
        ("extra", jnp.ones(1)),
    ],
)
def test_trees_that_do_not_fit_are_refused(which, path, bad):
    """Another structure, shape or kind than at init: never broadcast, and named with the path."""
    name = next(name for name in ("w", "layers", "extra") if name in path)
    bad = _PARAMS | {name: bad}
    trees = (bad, _STATE, _PARAMS) if which == "gradients" else (_PARAMS, _STATE, bad)
    with pytest.raises(REFUSED, match=f"(?s){which}.*{path}"):
        _OPT.update(*trees)


def test_what_is_missing_is_refused():
    """Params, the gradients as a whole, and a parameter that has a gradient."""
    with pytest.raises(ValueError, match="params"):
        _OPT.update(_PARAMS, _STATE)
    with pytest.raises(REFUSED, match="gradients"):
        _OPT.update(None, _STATE, _PARAMS)
    with pytest.raises(REFUSED, match=r"params\['w'\]"):
        _OPT.update(_PARAMS, _STATE, _PARAMS | {"w": None})


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda s: s._replace(mu={**s.mu, "w": s.mu["w"].astype(jnp.bfloat16)}), r"state\.mu\["),
        (lambda s: s._replace(nu={**s.nu, "w": jnp.zeros((2, 3), jnp.int32)}), r"state\.(mu|nu)\["),
        (lambda s: s._replace(nu={**s.nu, "w": jnp.zeros(())}), r"state\.(mu|nu)\["),
        (lambda s: s._replace(count=jnp.zeros(())), r"state\.count"),
        (lambda s: s._asdict(), "state"),
        (jax.tree.leaves, "state"),
        (lambda s: jax.tree.map(lambda x: np.asarray(x).view("V4"), s), "state"),
        (lambda s: optax.adamaxw(1e-3).init(_PARAMS), "state"),
        (lambda s: adamaxw.adamaxw(1e-2, moment_dtype="uint8").init(_PARAMS), "state"),
    ],
)
def test_a_state_that_init_does_not_make_is_refused(spoil, named):
    """One that was cast, or restored as a dict or list, or is of another format or optimizer."""
    with pytest.raises(REFUSED, match=named):
        _OPT.update(_PARAMS, spoil(_STATE), _PARAMS)
