"""The transformation on trees, beside float64 and beside Optax."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import KINDS, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, rms_error

import adamaxw


class Pair(NamedTuple):
    """A node that is neither list nor dict."""

    first: object
    second: object


def _params():
    """A tree of several kinds of nodes, with a 0-d leaf, an empty one and a None."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "dense": {"kernel": normal(8, 16), "bias": normal(16)},
        "pair": Pair(normal(64), [normal(), None]),
        "empty": normal(0, 3),
    }


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _gradients_like(params, kind, steps):
    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(
        [jnp.asarray(gradients(kind, steps, p.shape, seed)) for seed, p in enumerate(leaves)]
    )


@functools.cache
def _training(factory, case=None, **hyperparameters):
    """Compiles: train on given gradients; the history of (updates, params, mu, nu), stacked."""
    opt = factory(**(_CASES[case] if case else hyperparameters))

    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        params = optax.apply_updates(params, updates)
        moments = (optax.tree.get(state, name) for name in ("mu", "nu"))
        return (params, state), (updates, params, *moments)

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, opt.init(p)), g)[1])


def _columns(tree):
    """Leaves with a leading axis of steps, side by side in one float64 array (steps, elements)."""
    leaves = (np.asarray(x, np.float64) for x in jax.tree.leaves(tree))
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


_STEPS = 4000


def _standard(schedule):
    """Lets a schedule of Optax, which is not written for strict promotion, run under it."""
    return jax.numpy_dtype_promotion("standard")(schedule)


_WARMUP = _standard(optax.schedules.warmup_cosine_decay_schedule(0.0, 3e-3, 400, _STEPS, 1e-5))
_MORE_DECAY = _standard(optax.linear_schedule(0.0, 0.3, 1000))
_CASES = {
    "defaults": {"learning_rate": 1e-3},
    "schedules": {"learning_rate": _WARMUP, "weight_decay": _MORE_DECAY},
    "mask": {"learning_rate": 3e-3, "weight_decay": 0.2, "mask": _matrices},
    "other rates": {"learning_rate": 1e-2, "b1": 0.95, "b2": 0.99, "eps": 1e-6},
    "no memory": {"learning_rate": 1e-3, "b1": 0.0, "b2": 0.0, "weight_decay": 0.01},
    "nothing forgotten": {"learning_rate": 1e-3, "b1": 0.999, "b2": 1.0},
}


def _oracle(params, learning_rate, mask=None, weight_decay=1e-4, **rates):
    """The oracle for all elements of `params`, with what a schedule gives in float32."""

    def known(x):
        if not callable(x):
            return x
        values = np.asarray(jax.vmap(x)(jnp.arange(_STEPS)), np.float64)
        return lambda t: values[t]

    decays = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
    decays = jax.tree.map(lambda d, p: np.full((1, *p.shape), d), decays, params)
    p = _columns(jax.tree.map(lambda p: p[None], params))[0]
    return Oracle(
        p, known(learning_rate), wd=known(weight_decay), decays=_columns(decays)[0] == 1, **rates
    )


def _assert_as_close_as_optax(params, grads, hyperparameters, ours, theirs):
    """Each of updates, params, mu and nu is as close to the oracle, or closer."""
    exact = _oracle(params, **hyperparameters).run(_columns(grads))
    for name, got, peer, true in zip(
        ("updates", "params", "mu", "nu"), ours, theirs, exact, strict=True
    ):
        error, reference = (rms_error(_columns(x), true) for x in (got, peer))
        # Both round the same sums p + u, each its own way: that leaves 1% to chance.
        assert error <= 1.01 * reference, (name, hyperparameters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", _CASES)
def test_as_close_to_float64_as_optax(case, kind):
    """Thousands of steps, never synchronised: our error is not larger than that of Optax."""
    params = _params()
    grads = _gradients_like(params, kind, _STEPS)
    ours = _training(adamaxw.adamaxw, case)(params, grads)
    with jax.numpy_dtype_promotion("standard"):
        theirs = _training(optax.adamaxw, case)(params, grads)
    _assert_as_close_as_optax(params, grads, _CASES[case], ours, theirs)


@pytest.mark.parametrize("seed", range(24))
def test_as_close_to_float64_as_optax_for_random_hyperparameters(seed):
    """The same for hyperparameters from all over their ranges, b1 and b2 near 0 and near 1."""
    rng = np.random.default_rng(seed)

    def decay_rate():
        distance = 10 ** rng.uniform(-4, -0.1)
        return float(distance if rng.random() < 0.5 else 1 - distance)

    hyperparameters = {
        "learning_rate": float(10 ** rng.uniform(-4, -1)),
        "b1": decay_rate(),
        "b2": decay_rate(),
        "eps": float(10 ** rng.uniform(-12, -4)),
        "weight_decay": float(10 ** rng.uniform(-5, 0)),
    }
    # Enough elements for chance to stay within the 1%.
    params = jnp.asarray(rng.normal(size=4096), jnp.float32)
    grads = gradients(KINDS[seed % len(KINDS)], 1000, (4096,), seed)
    ours = _training(adamaxw.adamaxw, **hyperparameters)(params, grads)
    with jax.numpy_dtype_promotion("standard"):
        theirs = _training(optax.adamaxw, **hyperparameters)(params, grads)
    _assert_as_close_as_optax(params, grads, hyperparameters, ours, theirs)


@pytest.mark.parametrize("wd", [0.01, _MORE_DECAY])
def test_decay_that_is_not_scaled_by_the_learning_rate(wd):
    """scale_decay_by_lr=False decays by weight_decay alone (Loshchilov & Hutter 2019)."""
    params = jnp.linspace(-1.0, 1.0, 8)
    grads = gradients("normal", 500, (8,))
    case = {"learning_rate": 1e-3, "weight_decay": wd, "scale_decay_by_lr": False}
    _, got, _, _ = _training(adamaxw.adamaxw, **case)(params, grads)
    oracle = _oracle(params, **case)
    _, exact, _, _ = oracle.run(grads)
    np.testing.assert_allclose(got, exact, atol=1e-6)


_LEAVES = st.one_of(
    st.none(),
    st.lists(st.integers(0, 4), max_size=3).map(lambda shape: np.ones(shape, np.float32)),
)
_TREES = st.recursive(
    _LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.builds(Pair, children, children),
        st.dictionaries(st.sampled_from("abcd"), children, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(
    params=_TREES.filter(lambda tree: tree is not None),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_any_tree_any_prefix_mask(params, seed, data):
    """On random trees with random prefix masks, three steps agree with Optax."""
    rng = np.random.default_rng(seed)

    def prefix(node):
        """A random prefix of `node` with booleans at its leaves."""
        if node is None:
            return None
        if isinstance(node, np.ndarray) or data.draw(st.booleans()):
            return data.draw(st.booleans())
        return jax.tree.map(prefix, node, is_leaf=lambda x: x is not node)

    mask = prefix(params)
    grads = [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        for _ in range(3)
    ]

    def train(opt):
        trained, state = params, opt.init(params)
        for g in grads:
            updates, state = opt.update(g, state, trained)
            trained = optax.apply_updates(trained, updates)
        return trained

    ours = train(adamaxw.adamaxw(0.1, weight_decay=0.5, mask=mask))
    with jax.numpy_dtype_promotion("standard"):
        theirs = train(optax.adamaxw(0.1, weight_decay=0.5, mask=mask))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), ours, theirs)
