"""Inside the wrappers of Optax, as a drop-in for optax.adamaxw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import EVERY_MOMENT_DTYPE, HYPER, WRAPPERS, make_params, states_in
from equality import types_of

import adamaxw
from adamaxw import moments

# The wrappers of Optax promote.
pytestmark = pytest.mark.usefixtures("standard_promotion", "compile_fast")

_PARAMS = make_params()
_CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def _train(opt, params, steps=10):
    """Params after steps on a loss with curvature; the types of our states must not change."""
    opt = optax.with_extra_args_support(opt)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(
            lambda tree: sum(jnp.sum((p - 0.3) ** 4) for p in jax.tree.leaves(tree))
        )(params)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = opt.init(params)
    for _ in range(steps):
        params, new = step(params, state)
        assert [*map(types_of, states_in(new))] == [*map(types_of, states_in(state))]
        state = new
    return params


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_trains_as_the_reference_does(wrapper):
    """In every wrapper, parameters follow those of optax.adamaxw in the same wrapper."""
    ours, theirs = (
        _train(WRAPPERS[wrapper](make), _PARAMS) for make in (adamaxw.adamaxw, optax.adamaxw)
    )
    jax.tree.map(_CLOSE, ours, theirs)


def test_lookahead():
    """Fast and slow parameters follow those of the reference."""

    def train(make):
        opt = optax.lookahead(make(**HYPER), 3, 0.5, reset_state=True)
        params = optax.LookaheadParams.init_synced(_PARAMS)
        state = opt.init(params)
        for _ in range(7):
            updates, state = opt.update(params.fast, state, params)
            params = optax.apply_updates(params, updates)
        return params

    jax.tree.map(_CLOSE, train(adamaxw.adamaxw), train(optax.adamaxw))


@pytest.mark.parametrize("wrapper", ["apply_if_finite", "conditionally_mask"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_mixed_precision_in_wrappers_that_branch(wrapper, dtypes):
    """Both branches return the same types, whichever of params and gradients is narrower."""
    params, grads = map(make_params, dtypes)
    opt = WRAPPERS[wrapper](adamaxw.adamaxw)
    state, step = opt.init(params), jax.jit(opt.update)
    for g in (grads, jax.tree.map(lambda g: g * jnp.nan, grads), grads):
        updates, new = step(g, state, params)
        assert types_of(new) == types_of(state)
        state = new
    assert types_of(optax.apply_updates(params, updates)) == types_of(params)


def test_tree_get_and_set():
    """Count and moments are found by name, once each, and do not hide what others look for."""
    opt = optax.chain(
        adamaxw.adamaxw(lambda count: 1e-3), optax.contrib.reduce_on_plateau(patience=1)
    )
    state = opt.init(_PARAMS)
    _, state = opt.update(_PARAMS, state, _PARAMS, value=1.0)
    assert optax.tree.get(state[0], "count") == 1
    for name in ("mu", "nu"):
        assert jax.tree.structure(optax.tree.get(state, name)) == jax.tree.structure(_PARAMS)
    assert optax.tree.get(optax.tree.set(state, scale=0.5), "scale") == 0.5


@EVERY_MOMENT_DTYPE
def test_a_count_of_python(moment_dtype):
    """`optax.tree.set` may leave a Python int as the count; the next state has an int32 again."""
    opt = adamaxw.adamaxw(0.1, moment_dtype=moment_dtype)
    p = jnp.ones(3)
    state = optax.tree.set(opt.init(p), count=0)
    for update in (opt.update, jax.jit(opt.update)):
        count = update(p, state, p)[1].count
        assert (count, count.dtype) == (1, jnp.int32)


@pytest.mark.parametrize(
    "read", [moments.unpack, lambda s: adamaxw.diagnostics(jnp.ones(3), s, jnp.ones(3))]
)
def test_a_vmapped_state_is_refused(read):
    """The state of a vmapped optimizer must be read under jax.vmap as well."""
    opt = adamaxw.adamaxw(0.1, moment_dtype="uint8")
    states = jax.vmap(opt.init)(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="state"):
        read(states)
