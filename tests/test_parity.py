"""Trees of parameters trained beside `optax.adamaxw`, both compared with float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradients import KINDS, gradients
from modes import x64
from oracle import Oracle, rms_error

import adamaxw

_STEPS = 4000


def _standard(schedule):
    """A schedule of Optax, made to run under strict promotion."""
    return jax.numpy_dtype_promotion("standard")(schedule)


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


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


def _params(dtype="float32"):
    """A tree of several kinds of nodes, with a 0-d leaf, an empty one and a None."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        x = rng.normal(size=shape) + 1j * rng.normal(size=shape)
        return jnp.asarray(x if dtype == "complex64" else x.real, dtype)

    # Enough elements for chance to stay within the 1%.
    return {
        "dense": {"kernel": normal(16, 24), "bias": normal(16)},
        "pair": (normal(47), [normal(), None]),
        "empty": normal(0, 3),
    }


def _gradients_like(params, kinds, steps, seed=0):
    """Leaves of shape (steps, kinds, *shape)."""

    def of(i, p):
        g = np.stack([gradients(kind, steps, p.shape, seed + i) for kind in kinds], axis=1)
        if jnp.iscomplexobj(p):
            g = g + np.complex64(1j) * np.roll(g, 1, axis=0)
        return jnp.asarray(g, p.dtype)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(of, range(len(leaves)), leaves))


def _train(factory, hyperparameters, params, grads):
    """The history of (updates, params, mu, nu), shaped like `grads`: one training per kind."""
    opt = factory(**hyperparameters)

    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        params = optax.apply_updates(params, updates)
        moments = (optax.tree.get(state, name) for name in ("mu", "nu"))
        return (params, state), (updates, params, *moments)

    def train(g):
        return jax.lax.scan(step, (params, opt.init(params)), g)[1]

    return jax.vmap(train, in_axes=1, out_axes=1)(grads)


def _columns(tree):
    """All leaves in one array of shape (steps, kinds, elements)."""
    leaves = (np.asarray(x) for x in jax.tree.leaves(tree))
    x = np.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], axis=2)
    return x.astype(np.result_type(x.dtype, np.float64))


def _exact(params, grads, learning_rate, mask=None, weight_decay=1e-4, **rates):
    """The history of the oracle, given the float32 values of schedules."""

    def known(x):
        if not callable(x):
            return float(x)
        values = np.asarray(jax.vmap(x)(jnp.arange(_STEPS)), np.float64)
        return lambda t: values[t]

    decays = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
    decays = jax.tree.map(lambda d, p: np.full((1, 1, *p.shape), d), decays, params)
    p = _columns(jax.tree.map(lambda p: p[None, None], params))[0]
    g = _columns(grads)
    rates = jax.tree.map(float, rates) | {"lr": known(learning_rate), "wd": known(weight_decay)}
    oracle = Oracle(np.tile(p, (g.shape[1], 1)), decays=_columns(decays)[0] == 1, **rates)
    return oracle.run(g)


def _assert_as_close_as_optax(train, h, params, grads):
    """For each kind, the errors of updates, params, mu and nu are at most those of Optax.

    The rounding errors of p + u differ by chance, which the 1% allows for.
    """
    ours = train(adamaxw.adamaxw, h, params, grads)
    with jax.numpy_dtype_promotion("standard"):
        theirs = train(optax.adamaxw, h, params, grads)
    names = ("updates", "params", "mu", "nu")
    for name, true, *two in zip(names, _exact(params, grads, **h), ours, theirs, strict=True):
        for kind, of_kind in enumerate(np.moveaxis(true, 1, 0)):
            error, reference = (rms_error(_columns(x)[:, kind], of_kind) for x in two)
            assert error <= 1.01 * reference, (name, kind)


def _compiled(factory, h, params, grads):
    return jax.jit(functools.partial(_train, factory, h))(params, grads)


@pytest.mark.parametrize("case", _CASES)
def test_as_close_to_float64_as_optax(case):
    """After thousands of steps our error is not larger than that of Optax."""
    params = _params()
    grads = _gradients_like(params, KINDS, _STEPS)
    _assert_as_close_as_optax(_compiled, _CASES[case], params, grads)


@pytest.mark.parametrize("dtype", ["complex64", "float64"])
def test_other_dtypes_are_as_close(dtype):
    """complex64 is as close to complex128 as Optax; float64 is accurate to its last digits."""
    with x64() if dtype == "float64" else jax.numpy_dtype_promotion("strict"):
        h, params = _CASES["other rates"], _params(dtype)
        grads = _gradients_like(params, KINDS[:3], 2000)
        if dtype == "complex64":
            _assert_as_close_as_optax(_compiled, h, params, grads)
            return
        got = _compiled(adamaxw.adamaxw, h, params, grads)
        for x, true in zip(got, _exact(params, grads, **h), strict=True):
            assert rms_error(_columns(x), true) < 1e-14


_with_traced_rates = jax.jit(_train, static_argnums=0)


@pytest.mark.parametrize("seed", range(16))
def test_as_close_to_float64_as_optax_for_random_hyperparameters(seed):
    """The same holds for traced hyperparameters, with b1 and b2 near 0 and near 1."""
    rng = np.random.default_rng(seed)

    def decay_rate():
        distance = 10 ** rng.uniform(-4, -0.1)
        return distance if rng.random() < 0.5 else 1 - distance

    h = {
        "learning_rate": 10 ** rng.uniform(-4, -1),
        "b1": decay_rate(),
        "b2": decay_rate(),
        "eps": 10 ** rng.uniform(-12, -4),
        "weight_decay": 10 ** rng.uniform(-5, 0),
    }
    h = {name: jnp.float32(x) for name, x in h.items()}
    # Enough elements for chance to stay within the 1%.
    params = jnp.asarray(rng.normal(size=1024), jnp.float32)
    grads = _gradients_like(params, [KINDS[seed % len(KINDS)]], 1000, seed)
    _assert_as_close_as_optax(_with_traced_rates, h, params, grads)
