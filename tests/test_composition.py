"""Together with the wrappers of Optax, as a drop-in for optax.adamaxw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import types_of

import adamaxw

_PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3), "s": jnp.ones(())}
_HYPER = {"learning_rate": 1e-2, "weight_decay": 0.3}
_MATRICES = {"w": True, "b": False, "s": False}


# The wrappers of Optax promote.
pytestmark = pytest.mark.usefixtures("standard_promotion", "compile_fast")


def _labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)


_WRAPPERS = {
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(0.5), make(**_HYPER)),
    "chain before": lambda make: optax.chain(make(**_HYPER), optax.scale(0.5)),
    "masked": lambda make: optax.masked(make(**_HYPER), _MATRICES),
    "masked, masked inside": lambda make: optax.masked(
        make(**_HYPER, mask={"w": True, "b": True, "s": False}), {"w": True, "b": False, "s": True}
    ),
    "masked, callable inside": lambda make: optax.masked(
        make(**_HYPER, mask=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)),
        {"w": True, "b": False, "s": True},
    ),
    "partition": lambda make: optax.partition(
        {"matrix": make(**_HYPER), "rest": make(0.1, weight_decay=0.0)}, _labels
    ),
    "multi_transform": lambda make: optax.multi_transform(
        {"matrix": make(**_HYPER), "rest": optax.sgd(0.1)}, _labels
    ),
    "MultiSteps": lambda make: optax.MultiSteps(make(**_HYPER), every_k_schedule=3),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(**_HYPER), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(**_HYPER),
    "inject_hyperparams, scheduled": lambda make: optax.inject_hyperparams(
        make, static_args=("mask",)
    )(
        learning_rate=optax.linear_schedule(0.1, 0.0, 10),
        b1=optax.linear_schedule(0.8, 0.95, 10),
        weight_decay=0.3,
        mask=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree),
    ),
    "flatten": lambda make: optax.flatten(make(**_HYPER)),
    "conditionally_mask": lambda make: optax.conditionally_mask(
        make(**_HYPER), lambda step: step % 2 == 0
    ),
    "conditionally_transform": lambda make: optax.conditionally_transform(
        make(**_HYPER), lambda step: step < 5
    ),
    "named_chain": lambda make: optax.named_chain(("adamax", make(**_HYPER))),
    "with_extra_args_support": lambda make: optax.with_extra_args_support(make(**_HYPER)),
    "split_real_and_imaginary": lambda make: optax.contrib.split_real_and_imaginary(make(**_HYPER)),
    "reduce_on_plateau": lambda make: optax.chain(
        make(**_HYPER), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "freeze": lambda make: optax.chain(
        make(**_HYPER), optax.transforms.freeze({"w": False, "b": True, "s": False})
    ),
}


def _types_of_ours(state):
    """The types of every AdamaxState inside the state of a wrapper."""

    def is_ours(node):
        return isinstance(node, adamaxw.AdamaxState)

    nodes = jax.tree.leaves(state, is_leaf=is_ours)
    return [types_of(node) for node in nodes if is_ours(node)]


def _train(opt, params, steps=10):
    """Ten steps on a loss with curvature, jitted; the last params and state."""
    opt = optax.with_extra_args_support(opt)
    target = jax.tree.map(lambda p: jnp.full(p.shape, 0.3), params)

    def loss(params):
        return sum(
            jnp.sum((p - q) ** 4)
            for p, q in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
        )

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = opt.init(params)
    for _ in range(steps):
        params, new = step(params, state)
        assert _types_of_ours(new) == _types_of_ours(state)
        state = new
    return params, state


@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_wrapped_like_the_reference(wrapper):
    """Inside each wrapper it trains as optax.adamaxw does, and its state keeps its types."""
    ours, _ = _train(_WRAPPERS[wrapper](adamaxw.adamaxw), _PARAMS)
    theirs, _ = _train(_WRAPPERS[wrapper](optax.adamaxw), _PARAMS)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, ours, theirs)


@pytest.mark.parametrize("reset_state", [False, True])
def test_lookahead(reset_state):
    """Fast and slow parameters move as with the reference."""

    def train(make):
        opt = optax.lookahead(make(**_HYPER), 3, 0.5, reset_state)
        params = optax.LookaheadParams.init_synced(_PARAMS)
        state = opt.init(params)
        for _ in range(7):
            updates, state = opt.update(params.fast, state, params)
            params = optax.apply_updates(params, updates)
        return params

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, train(adamaxw.adamaxw), train(optax.adamaxw))


@pytest.mark.parametrize("grad_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda opt: optax.apply_if_finite(opt, 2),
        lambda opt: optax.MultiSteps(opt, 2),
        lambda opt: optax.MultiSteps(opt, 2, should_skip_update_fn=optax.skip_not_finite),
        lambda opt: optax.conditionally_mask(opt, lambda step: step % 2 == 0),
    ],
)
def test_mixed_precision_in_wrappers_that_branch(wrap, param_dtype, grad_dtype):
    """Both branches have the same types, whichever of params and gradients is narrower."""
    params = jax.tree.map(lambda p: p.astype(param_dtype), _PARAMS)
    grads = jax.tree.map(lambda p: p.astype(grad_dtype), _PARAMS)
    opt = wrap(adamaxw.adamaxw(**_HYPER))
    if (
        isinstance(opt, optax.MultiSteps)
        and param_dtype != grad_dtype
        and not hasattr(opt, "_accumulator_dtype")
    ):
        pytest.skip("before Optax 0.2.8 MultiSteps itself fails where the dtypes differ")
    bad = jax.tree.map(lambda g: g * jnp.nan, grads)
    state = opt.init(params)
    step = jax.jit(opt.update)
    for g in (grads, grads, bad, grads, grads):
        updates, new = step(g, state, params)
        assert types_of(new) == types_of(state)
        state = new
    applied = optax.apply_updates(params, updates)
    assert jax.tree.map(lambda p: p.dtype, applied) == jax.tree.map(lambda p: p.dtype, params)


def test_apply_if_finite_forgets_a_bad_step():
    """The run with a NaN and an inf in between is the run without them."""
    opt = optax.apply_if_finite(adamaxw.adamaxw(**_HYPER), 5)
    state = clean = opt.init(_PARAMS)
    for factor in (1.0, jnp.nan, 2.0, jnp.inf, 3.0):
        grads = jax.tree.map(lambda p, factor=factor: p * factor, _PARAMS)
        _, state = opt.update(grads, state, _PARAMS)
        if jnp.isfinite(factor):
            _, clean = opt.update(grads, clean, _PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, clean.inner_state)
    assert state.total_notfinite == 2


def test_variant_that_decays_a_subset_through_masked():
    """The variant of the reference's warning, with the transformations of this package."""
    rest = jax.tree.map(lambda m: not m, _MATRICES)
    lr, wd = 1e-2, 0.3
    variant = optax.chain(
        optax.masked(adamaxw.adamaxw(lr, weight_decay=wd), _MATRICES),
        optax.masked(adamaxw.adamax(lr), rest),
    )
    masked, _ = _train(adamaxw.adamaxw(lr, weight_decay=wd, mask=_MATRICES), _PARAMS)
    jax.tree.map(np.testing.assert_array_equal, _train(variant, _PARAMS)[0], masked)


def test_tree_map_params():
    """Optax finds the copies of params in the state, with and without a mask."""
    for mask in (None, _MATRICES, lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)):
        opt = adamaxw.adamaxw(1e-3, mask=mask)
        state = opt.init(_PARAMS)
        names = {"w": "W", "b": "B", "s": "S"}
        named = optax.tree.map_params(
            opt, lambda _, name: name, state, names, transform_non_params=lambda _: "other"
        )
        assert named == adamaxw.AdamaxState("other", names, names)


def test_tree_get_and_set():
    """Count and moments are found by name in any wrapper; each occurs once."""
    opt = optax.chain(optax.clip(1.0), adamaxw.adamaxw(lambda count: 1e-3))
    state = opt.init(_PARAMS)
    _, state = opt.update(_PARAMS, state, _PARAMS)
    assert optax.tree.get(state, "count") == 1
    assert jax.tree.structure(optax.tree.get(state, "mu")) == jax.tree.structure(_PARAMS)
    assert jax.tree.structure(optax.tree.get(state, "nu")) == jax.tree.structure(_PARAMS)
    assert optax.tree.get(optax.tree.set(state, count=jnp.asarray(7)), "count") == 7


def test_names_in_the_state_do_not_collide():
    """What programs look for in the states of other transformations is still found."""
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    for make in (adamaxw.adamaxw, optax.adamaxw):
        state = optax.chain(make(1e-3), plateau).init(_PARAMS)
        assert optax.tree.get(state, "scale") == 1.0
        assert optax.tree.get(optax.tree.set(state, scale=0.5), "scale") == 0.5


def test_hyperparameters_can_be_changed_by_hand():
    """With inject_hyperparams, between steps and without compiling again."""
    opt = optax.inject_hyperparams(adamaxw.adamaxw)(**_HYPER)
    state = opt.init(_PARAMS)
    step = jax.jit(opt.update)
    before, _ = step(_PARAMS, state, _PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(1e-3)
    after, _ = step(_PARAMS, state, _PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 10 * b, rtol=1e-5), before, after)
    assert step._cache_size() == 1
