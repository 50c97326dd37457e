"""What the transformation keeps fixed, and what it does with every kind of leaf."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import types_of
from modes import x64
from oracle import Oracle

import adamaxw
from adamaxw import AdamaxState

_OPT = adamaxw.adamaxw(1e-2, weight_decay=0.1)
_FLOATS = ("bfloat16", "float16", "float32")


def test_signature_begins_with_the_documented_arguments():
    """Names, order, defaults as in optax.adamaxw; what is ours is keyword-only."""
    ours = list(inspect.signature(adamaxw.adamaxw).parameters.values())
    theirs = list(inspect.signature(optax.adamaxw).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("opt", [_OPT, adamaxw.adamax(0.1)])
def test_is_a_gradient_transformation_with_extra_args(opt):
    """It is Optax's type, and it ignores extra arguments that are for others."""
    assert isinstance(opt, optax.GradientTransformationExtraArgs)
    params = jnp.ones(3)
    opt.update(params, opt.init(params), params, value=1.0, grad=params)


def test_adamax_is_adamaxw_without_decay():
    """Same updates and state as weight_decay=0, with or without params."""
    params, grads = jnp.linspace(1.0, 2.0, 5), jnp.linspace(-1.0, 1.0, 5)
    plain, decoupled = adamaxw.adamax(0.1), adamaxw.adamaxw(0.1, weight_decay=0.0)
    state = plain.init(params)
    expected = decoupled.update(grads, state, params)
    for result in (plain.update(grads, state), plain.update(grads, state, params)):
        jax.tree.map(np.testing.assert_array_equal, result, expected)


@pytest.mark.parametrize("grad_dtype", _FLOATS)
@pytest.mark.parametrize("param_dtype", _FLOATS)
def test_low_precision_moves_like_float32(param_dtype, grad_dtype):
    """The moments and the step are those of float32; only the last cast is coarse."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=16), param_dtype)
    state = _OPT.init(params)
    oracle = Oracle(params.astype(jnp.float32), lr=1e-2, wd=0.1)
    for _ in range(300):
        grads = jnp.asarray(rng.normal(size=16), grad_dtype)
        exact = oracle.step(grads.astype(jnp.float32))
        updates, state = _OPT.update(grads, state, params)
        assert updates.dtype == grads.dtype
        # One rounding to the gradient's dtype, subnormal in float16 where it is smallest.
        info = jnp.finfo(grad_dtype)
        np.testing.assert_allclose(
            updates.astype(jnp.float32),
            exact,
            rtol=float(info.eps) / 2 + 2e-5,
            atol=float(info.smallest_subnormal) + 1e-8,
        )
        # The decay sees the parameter as it is stored.
        params = jnp.asarray(oracle.p, param_dtype)
        oracle.p = np.asarray(params.astype(jnp.float32), np.float64)
    assert state.mu.dtype == state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.mu, oracle.m, atol=1e-6)
    np.testing.assert_allclose(state.nu, oracle.u, rtol=1e-5)


@pytest.mark.parametrize("grad_dtype", _FLOATS)
@pytest.mark.parametrize("param_dtype", [*_FLOATS, "complex64"])
def test_state_types_are_fixed_at_init(param_dtype, grad_dtype):
    """Structure, shapes, dtypes and weak types: after init, eager, jit, scan, cond, eval_shape."""
    if param_dtype == "complex64":
        grad_dtype = "complex64"
    params = {"w": jnp.ones((2, 3), param_dtype), "b": jnp.ones((), param_dtype)}
    grads = jax.tree.map(lambda p: p.astype(grad_dtype), params)
    state = _OPT.init(params)
    expected = types_of(state)

    def step(state):
        return _OPT.update(grads, state, params)[1]

    assert types_of(step(state)) == expected
    assert types_of(jax.jit(step)(state)) == expected
    assert types_of(jax.lax.scan(lambda s, _: (step(s), None), state, length=2)[0]) == expected
    assert types_of(jax.lax.cond(state.count == 0, step, lambda s: s, state)) == expected
    assert types_of(jax.jit(_OPT.init)(params)) == expected
    assert types_of(jax.eval_shape(_OPT.init, params)) == expected
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert types_of(_OPT.init(abstract)) == expected


def test_python_and_numpy_leaves():
    """Params and gradients may be Python numbers and NumPy arrays, as in Optax."""
    params = {"a": 1.0, "b": np.ones(2), "c": np.float32(3)}
    grads = {"a": 0.5, "b": np.ones(2), "c": np.float32(-1)}
    state = _OPT.init(params)
    updates, new = _OPT.update(grads, state, params)
    assert types_of(new) == types_of(state)
    for name in params:
        expected = Oracle(params[name], lr=1e-2, wd=0.1).step(grads[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5)


def test_compiles_once():
    """The state that comes out of a step is of the types that went in."""
    # A function of its own: jit keeps one cache for each.
    step = jax.jit(lambda *args: _OPT.update(*args))
    params = jax.device_put({"w": jnp.ones(4)}, jax.devices()[1])
    state = _OPT.init(params)
    for _ in range(3):
        _, state = step(params, state, params)
    assert step._cache_size() == 1


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_state_can_be_donated(wrap):
    """No buffer occurs twice in a state, so that all can be given away, and all are reused."""
    params = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64)), "s": jnp.ones(())}
    state = wrap(_OPT.init)(params)
    step = jax.jit(_OPT.update, donate_argnums=1)
    for _ in range(3):
        leaves = jax.tree.leaves(state)
        pointers = {x.unsafe_buffer_pointer() for x in leaves}
        assert len(pointers) == len(leaves)
        _, state = step(params, state, params)
        assert all(x.is_deleted() for x in leaves)


def test_vmap_over_hyperparameters():
    """Every hyperparameter may be a traced scalar; each lane trains as if alone."""
    names = ("learning_rate", "b1", "b2", "eps", "weight_decay")
    lanes = {
        "learning_rate": [1e-3, 1e-2, 0.1],
        "b1": [0.0, 0.5, 0.9],
        "b2": [0.0, 0.99, 1.0],
        "eps": [1e-8, 1e-6, 1e-4],
        "weight_decay": [0.0, 0.1, 1.0],
    }
    params = jnp.linspace(-1.0, 1.0, 6)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(20, 6)), jnp.float32)

    def train(*values):
        opt = adamaxw.adamaxw(**dict(zip(names, values, strict=True)))

        def step(carry, g):
            params, state = carry
            updates, state = opt.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, opt.init(params)), grads)[0]

    many, _ = jax.vmap(train)(*(jnp.asarray(lanes[name]) for name in names))
    for lane in range(3):
        alone, _ = train(*(lanes[name][lane] for name in names))
        np.testing.assert_allclose(many[lane], alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.1), ("b1", 0.0), ("b1", 0.9), ("b2", 0.5), ("weight_decay", 0.0)],
)
def test_differentiable_with_respect_to_hyperparameters(name, value):
    """The gradient of a loss after training agrees with differences, at the bounds too."""

    def loss(x):
        params = jnp.array([1.0, -2.0])
        hyperparameters = {"learning_rate": 0.1, "b2": 0.5, "weight_decay": 0.1, name: x}
        opt = adamaxw.adamaxw(**hyperparameters)
        state = opt.init(params)
        for scale in (2.0, 1.0, 0.1):
            updates, state = opt.update(scale * params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    low = max(value - 5e-3, 0.0)
    high = low + 1e-2
    difference = (loss(jnp.float32(high)) - loss(jnp.float32(low))) / (high - low)
    np.testing.assert_allclose(jax.grad(loss)(value), difference, rtol=5e-2, atol=1e-3)


def test_count_stops_at_its_ceiling():
    """After 2**31 - 1 updates the count stays, and steps go on with full bias correction."""
    params = jnp.ones(2)
    ceiling = 2**31 - 1
    state = _OPT.init(params)._replace(count=jnp.asarray(ceiling - 1, jnp.int32))
    for _ in range(3):
        updates, state = _OPT.update(params, state, params)
        assert state.count == ceiling
        assert state.count.dtype == jnp.int32
        assert np.all(np.isfinite(updates))


def test_schedules_are_given_the_number_of_updates_done():
    """0 at the first update, as in Optax; both schedules see the same count."""
    seen = []

    def schedule(count):
        seen.append(int(count))
        assert count.dtype == jnp.int32
        return 0.1 / (1 + int(count))

    opt = adamaxw.adamaxw(schedule, weight_decay=schedule)
    params = jnp.ones(2)
    state = opt.init(params)
    for _ in range(3):
        _, state = opt.update(params, state, params)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_none_and_masked_nodes_pass_through():
    """Leaves that are no leaves: None and optax.MaskedNode stay where they are."""
    params = {"a": jnp.ones(2), "b": None, "c": optax.MaskedNode(), "d": (), "e": jnp.ones((0, 2))}
    state = _OPT.init(params)
    updates, new = _OPT.update(params, state, params)
    assert types_of(new) == types_of(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_tree_without_leaves():
    """Nothing to train is not an error."""
    updates, state = _OPT.update({}, _OPT.init({}), {})
    assert updates == {}
    assert state.count == 1


def test_a_gradient_that_is_none_leaves_its_parameter_alone():
    """As Equinox and partial fine-tuning give them: no update, and the moments stay."""
    params = {"trained": jnp.ones(2), "frozen": {"w": jnp.ones(3)}}
    grads = {"trained": jnp.ones(2), "frozen": {"w": None}}
    state = _OPT.init(params)
    for _ in range(2):
        updates, new = _OPT.update(grads, state, params)
        assert updates["frozen"]["w"] is None
        applied = eqx.apply_updates(params, updates)
        np.testing.assert_array_equal(applied["frozen"]["w"], params["frozen"]["w"])
        np.testing.assert_array_equal(new.mu["frozen"]["w"], np.zeros(3))
        assert types_of(new) == types_of(state)
        state = new


def test_integer_parameters_get_zero_updates():
    """With jax.grad(allow_int=True): float0 gradients; params keep values and dtypes."""
    params = {
        "w": jnp.ones(3),
        "steps": jnp.arange(4, dtype=jnp.int32),
        "flag": jnp.array([True, False]),
        "host": np.arange(2),
    }
    state = _OPT.init(params)
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    assert grads["steps"].dtype == jax.dtypes.float0
    for g in (grads, grads | {"steps": jnp.zeros(4, jnp.int32)}):
        updates, new = _OPT.update(g, state, params)
        assert types_of(new) == types_of(state)
        applied = optax.apply_updates(params, updates)
        for name in ("steps", "flag", "host"):
            np.testing.assert_array_equal(applied[name], params[name])
            assert applied[name].dtype == jax.dtypes.canonicalize_dtype(params[name].dtype)
    jitted, _ = jax.jit(_OPT.update)({**grads, "host": updates["host"]}, state, params)
    np.testing.assert_allclose(jitted["w"], updates["w"])


def test_complex_parameters():
    """The norm is that of the modulus, real; values agree with Optax and with float64."""
    rng = np.random.default_rng(0)

    def draw():
        return (rng.normal(size=8) + 1j * rng.normal(size=8)).astype(np.complex64)

    params = jnp.asarray(draw())
    state, theirs = _OPT.init(params), optax.adamaxw(1e-2, weight_decay=0.1)
    assert (state.mu.dtype, state.nu.dtype) == (jnp.complex64, jnp.float32)
    their_state = theirs.init(params)
    oracle = Oracle(params, lr=1e-2, wd=0.1)
    for _ in range(200):
        g = jnp.asarray(draw())
        exact = oracle.step(g)
        updates, state = _OPT.update(g, state, params)
        with jax.numpy_dtype_promotion("standard"):
            peer, their_state = theirs.update(g, their_state, params)
        np.testing.assert_allclose(updates, exact, atol=2e-7)
        np.testing.assert_allclose(updates, peer, atol=2e-7)
        params += updates
    np.testing.assert_allclose(state.mu, oracle.m, atol=1e-6)
    np.testing.assert_allclose(state.nu, oracle.u, rtol=1e-6)
    as_arrays = adamaxw.adamaxw(*map(jnp.float32, (1e-2, 0.9, 0.999, 1e-8, 0.1)))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        as_arrays.update(params, state, params),
        _OPT.update(params, state, params),
    )


def test_float64_beside_float32():
    """Under x64 a float64 parameter trains in float64, and its float32 neighbour in float32."""
    with x64():
        rng = np.random.default_rng(0)
        params = {
            "double": jnp.asarray(rng.normal(size=8)),
            "single": jnp.asarray(rng.normal(size=8), jnp.float32),
            "complex": jnp.asarray(rng.normal(size=8) + 1j * rng.normal(size=8)),
        }
        hyperparameters = [
            (1e-2, 0.9, 0.1),
            (jnp.float32(1e-2), jnp.float32(0.5), jnp.float64(0.1)),
            (lambda count: 1e-2 / (1.0 + count.astype(jnp.float32)), 0.9, 0.1),
        ]
        for lr, b1, wd in hyperparameters:
            opt = adamaxw.adamaxw(lr, b1, weight_decay=wd)
            state = opt.init(params)
            dtypes = jax.tree.map(lambda x: str(x.dtype), (state.mu, state.nu))
            assert dtypes[0] == {"double": "float64", "single": "float32", "complex": "complex128"}
            assert dtypes[1] == {"double": "float64", "single": "float32", "complex": "float64"}
            step = jax.jit(opt.update)
            known = (lambda t: float(np.float32(1e-2) / np.float32(1 + t))) if callable(lr) else lr
            oracle = Oracle(
                params["double"],
                lr=known if callable(known) else float(known),
                b1=float(b1),
                wd=float(wd),
            )
            for _ in range(100):
                grads = jax.tree.map(lambda p: p * rng.normal(size=8).astype(p.dtype), params)
                exact = oracle.step(grads["double"])
                oracle.p = np.asarray(params["double"])
                updates, new = step(grads, state, params)
                assert types_of(new) == types_of(state)
                state = new
                rtol = 1e-6 if callable(lr) else 1e-12
                np.testing.assert_allclose(updates["double"], exact, rtol=rtol)
                assert updates["single"].dtype == jnp.float32


@pytest.mark.parametrize("leaf", ["text", object(), jnp.sum, jax.random.key(0)])
def test_leaves_that_are_no_numbers_are_refused_at_init(leaf):
    """The error names the path, and None as the way round."""
    with pytest.raises(
        TypeError, match=r"params\['layer'\]\[1\] must be an array of numbers.*None"
    ):
        _OPT.init({"layer": [jnp.ones(2), leaf]})


_PARAMS = {"w": jnp.ones((2, 3)), "layers": [jnp.ones(2), jnp.ones(3)]}
_STATE = _OPT.init(_PARAMS)


def _with(path, value):
    tree = {"w": _PARAMS["w"], "layers": list(_PARAMS["layers"])}
    if path == "w":
        tree["w"] = value
    else:
        tree["layers"][path] = value
    return tree


@pytest.mark.parametrize("which", ["gradients", "params"])
@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("w", jnp.ones((3, 2)), ValueError, r"\['w'\] must be real of shape \(2, 3\).*\(3, 2\)"),
        ("w", jnp.ones(()), ValueError, r"\['w'\] must be real of shape \(2, 3\).*\(\)"),
        (1, jnp.ones(3, jnp.complex64), TypeError, r"\['layers'\]\[1\] must be real.*complex64"),
        (1, jnp.ones(3, jnp.int32), TypeError, r"\['layers'\]\[1\] must be real.*int32"),
        (0, np.zeros(2, jax.dtypes.float0), TypeError, r"\['layers'\]\[0\] must be real.*float0"),
        (0, "text", TypeError, r"\['layers'\]\[0\] must be real.*'text'"),
    ],
)
def test_leaves_that_do_not_fit_are_refused(which, path, value, error, message):
    """Shape or kind other than at init: named with the path, never broadcast or promoted."""
    bad = _with(path, value)
    trees = (bad, _STATE, _PARAMS) if which == "gradients" else (_PARAMS, _STATE, bad)
    with pytest.raises(error, match=which + message):
        _OPT.update(*trees)


@pytest.mark.parametrize("which", ["gradients", "params"])
@pytest.mark.parametrize(
    ("bad", "path"),
    [
        ({"w": _PARAMS["w"]}, "layers"),
        (_PARAMS | {"extra": jnp.ones(1)}, "extra"),
        (_with("w", [jnp.ones(2)]), r"\['w'\]"),
        (_PARAMS | {"layers": tuple(_PARAMS["layers"])}, r"\['layers'\]"),
        (_PARAMS | {"layers": _PARAMS["layers"][:1]}, r"\['layers'\]"),
    ],
)
def test_trees_of_another_structure_are_refused(which, bad, path):
    """The error names the tree and where it differs."""
    trees = (bad, _STATE, _PARAMS) if which == "gradients" else (_PARAMS, _STATE, bad)
    with pytest.raises(ValueError, match=f"(?s){which}.*{path}"):
        _OPT.update(*trees)


def test_a_gradient_where_params_had_a_subtree_is_refused():
    """A leaf in place of a subtree is no broadcast."""
    with pytest.raises(ValueError, match=r"gradients\['layers'\]"):
        _OPT.update({"w": jnp.ones((2, 3)), "layers": jnp.ones(2)}, _STATE, _PARAMS)


def test_no_gradients_at_all_are_refused():
    """None for the whole tree is a mistake, not a step without gradients."""
    with pytest.raises(ValueError, match="gradients are None"):
        _OPT.update(None, _STATE, _PARAMS)


def test_a_parameter_that_is_none_has_no_gradient():
    """A gradient for a parameter that is not there is named."""
    with pytest.raises(ValueError, match=r"params\['w'\].*None"):
        _OPT.update(_PARAMS, _STATE, _with("w", None))


def test_params_missing_and_state_of_another_optimizer():
    """Both are named."""
    with pytest.raises(ValueError, match=r"update\(gradients, state, params\)"):
        _OPT.update(_PARAMS, _STATE)
    other = optax.adamaxw(1e-3).init(_PARAMS)
    with pytest.raises(TypeError, match="state must be the AdamaxState"):
        _OPT.update(_PARAMS, other, _PARAMS)
    assert isinstance(_STATE, AdamaxState)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s._replace(mu={**s.mu, "w": s.mu["w"].astype(jnp.bfloat16)}),
        lambda s: s._replace(nu={**s.nu, "w": s.nu["w"].astype(jnp.bfloat16)}),
        lambda s: s._replace(nu={**s.nu, "w": jnp.zeros((2, 3), jnp.int32)}),
        lambda s: s._replace(nu={**s.nu, "w": jnp.zeros(())}),
        lambda s: s._replace(nu={**s.nu, "w": None}),
        lambda s: jax.tree.map(lambda x: x.astype(jnp.float16), s)._replace(count=s.count),
    ],
)
def test_a_state_that_was_cast_is_refused(spoil):
    """A checkpoint squeezed into bfloat16 would stop decaying without a word."""
    with pytest.raises(TypeError, match=r"state\.mu\[.*float32.*of shape"):
        _OPT.update(_PARAMS, spoil(_STATE), _PARAMS)


def test_a_count_that_is_no_integer_is_refused():
    """Nor may the count become a float, or be lost."""
    for count in (jnp.zeros(()), 0.0, jnp.zeros((), jnp.int8)):
        with pytest.raises(TypeError, match=r"state\.count must be int32"):
            _OPT.update(_PARAMS, _STATE._replace(count=count), _PARAMS)


@pytest.mark.parametrize("spoilt", [{"count": np.int32(-1)}, {"nu_scale": np.float32(np.inf)}])
def test_numpy_scalars_as_constants(spoilt):
    """Where gradients alone are traced, a spoilt one shows as NaN, with no warning of NumPy."""
    params = {"w": jnp.ones(3, jnp.bfloat16), "frozen": jnp.ones(2)}
    opt = adamaxw.adamaxw(0.1, moment_dtype="bfloat16", param_rounding="stochastic")
    state = opt.init(params)._replace(**spoilt)

    @jax.jit
    def step(g):
        return opt.update({"w": g, "frozen": None}, state, params)[0]["w"]

    assert np.all(np.isnan(step(params["w"]).astype(jnp.float32)))


def test_mixed_kinds_of_state_are_refused():
    """A real state cannot serve complex gradients, whatever the shapes."""
    step = functools.partial(_OPT.update, state=_OPT.init(jnp.ones(2)), params=jnp.ones(2))
    with pytest.raises(TypeError, match=r"gradients must be real of shape \(2,\)"):
        step(jnp.ones(2, jnp.complex64))


def test_leaves_that_convert_themselves_to_arrays():
    """With `__jax_array__`, as JAX itself takes them in its functions."""

    class Wrapped:
        def __init__(self, x):
            self.x = x
            self.dtype, self.shape = x.dtype, x.shape

        def __jax_array__(self):
            return self.x

    params = {"w": jnp.arange(3.0)}
    wrapped = {"w": Wrapped(params["w"])}
    opt = adamaxw.adamaxw(0.1)
    updates, _ = opt.update(wrapped, opt.init(wrapped), wrapped)
    expected, _ = opt.update(params, opt.init(params), params)
    np.testing.assert_array_equal(updates["w"], expected["w"])
