"""Optimizers that begin anew during training, and noise that is each run's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, types_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modes import apply_updates

import adamaxw
from adamaxw import moments

_FORMATS = [None, "bfloat16", "uint8"]


def _rounds(opt, begin, n=10_000, rounds=100, steps=5):
    """Parameters from 1 under a gradient of 1, with an optimizer begun anew each round."""
    p = jnp.ones(n, jnp.bfloat16)
    g = jnp.ones_like(p)
    update, state = jax.jit(opt.update), opt.init(p)
    for _ in range(rounds):
        state = begin(p, state)
        for _ in range(steps):
            updates, state = update(g, state, p)
            p = apply_updates(p, updates)
    return np.asarray(p, np.float32)


@pytest.mark.parametrize("moment_dtype", _FORMATS)
@pytest.mark.parametrize(
    ("param_rounding", "begin"),
    [
        ("stochastic", "init"),
        ("stochastic", "restart"),
        ("exact", "restart"),
        ("exact", "replace"),
    ],
)
def test_a_fresh_optimizer_now_and_again_does_not_freeze(param_rounding, begin, moment_dtype):
    """The inner loops of DiLoCo: 500 steps of 1e-4, a hundred fresh starts, all at 0.95."""
    opt = adamaxw.adamaxw(
        1e-4, weight_decay=0.0, moment_dtype=moment_dtype, param_rounding=param_rounding
    )
    p = _rounds(
        opt,
        {
            "init": lambda p, _: opt.init(p),
            "restart": lambda _, state: moments.restart(state),
            "replace": lambda p, state: opt.init(p)._replace(residual=state.residual),
        }[begin],
    )
    assert abs(p.mean() - 0.95) < 1e-2
    # 13 or so steps of 1/256, each of which comes by chance.
    assert p.std() < 0.02
    assert p.max() < 1


def test_a_single_parameter_restarts_with_other_noise():
    """Which does not depend on whether it has moved."""
    opt = adamaxw.adamaxw(1e-4, weight_decay=0.0, param_rounding="stochastic")
    p = _rounds(opt, lambda _, state: moments.restart(state), n=1, rounds=300)
    assert 0.7 < p[0] < 0.95


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_restart_inside_wrappers(moment_dtype):
    """Every AdamaxState in it, and no more; the types of the state stay."""
    opt = optax.MultiSteps(
        optax.partition(
            {
                name: adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding="exact")
                for name in "ab"
            },
            {"a": "a", "b": "b"},
        ),
        2,
    )
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    state = opt.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            _, state = opt.update(params, state, params)
    new = moments.restart(state)
    assert types_of(new) == types_of(state)
    assert new.mini_step == 1
    for name, old in state.inner_opt_state.inner_states.items():
        old, began = old.inner_state, new.inner_opt_state.inner_states[name].inner_state
        assert old.count == 1
        assert began.count == 0
        assert not any(x.any() for x in jax.tree.leaves((began.mu, began.nu)))
        assert_equal(began.residual, old.residual)
        assert old.seed is None or began.seed != old.seed


@pytest.mark.parametrize("moment_dtype", _FORMATS)
def test_a_state_set_to_zeros_is_a_fresh_one(moment_dtype):
    """By any of the usual ways: it trains as float32 does from init, and never shows NaN."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype)
    params = {"w": jnp.linspace(-1.0, 1.0, 64)}
    grads = jax.tree.map(jnp.cos, params)
    update = jax.jit(opt.update)

    def run(state):
        updates = {}
        for _ in range(5):
            updates, state = update(grads, state, params)
        return updates["w"]

    _, used = update(grads, opt.init(params), params)
    abstract = jax.eval_shape(opt.init, params)
    expected = run(opt.init(params))
    for zeros in (
        jax.tree.map(jnp.zeros_like, used),
        optax.tree.zeros_like(used),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract),
    ):
        np.testing.assert_allclose(run(zeros), expected, rtol=0.1)
        if moment_dtype is None:
            assert_equal(run(zeros), expected)


@pytest.mark.parametrize(
    ("moment_dtype", "scale"),
    [("bfloat16", 1e-8), ("bfloat16", -1.0), ("uint8", -1e-8), ("uint8", np.nan)],
)
def test_a_scale_of_no_state_shows_as_nan(moment_dtype, scale):
    """Such as that of another format."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype)
    p = jnp.ones(3)
    _, state = opt.update(p, opt.init(p), p)
    updates, _ = opt.update(p, state._replace(nu_scale=jnp.float32(scale)), p)
    assert np.isnan(updates).all()


def _noise(opt, p):
    """How a first step rounds parameters at 1, as 0 and 1."""
    updates, _ = opt.update(jnp.ones_like(p), opt.init(p), p)
    return jnp.asarray(updates) != 0


def _correlation(a, b):
    return abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


_STOCHASTIC = adamaxw.adamaxw(2e-3, weight_decay=0.0, param_rounding="stochastic")


def test_replicas_under_vmap_draw_noise_of_their_own():
    """Where their parameters differ, or else their seeds."""
    p = jnp.ones((2, 4096), jnp.bfloat16)
    differ = jax.vmap(lambda p: _noise(_STOCHASTIC, p))(p.at[1, 0].set(2))
    assert _correlation(*differ) < 0.1

    states = jax.vmap(_STOCHASTIC.init)(p)
    states = states._replace(seed=jnp.arange(2, dtype=jnp.uint32))
    updates, _ = jax.vmap(_STOCHASTIC.update)(jnp.ones_like(p), states, p)
    assert _correlation(*(jnp.asarray(updates) != 0)) < 0.1


def test_shards_draw_noise_of_their_own_where_jax_knows_that_they_differ():
    """Inside shard_map; what is replicated stays the same, and the seed is one for all."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    p = jnp.ones((8, 4096), jnp.bfloat16)

    def shards(check_vma, spec):
        step = jax.shard_map(
            lambda p: (_noise(_STOCHASTIC, p), _STOCHASTIC.init(p).seed),
            mesh=mesh,
            in_specs=spec,
            out_specs=(spec, P()),
            check_vma=check_vma,
        )
        return jax.jit(step)(p)

    noise, seed = shards(True, P("x"))
    assert _correlation(*noise[:2]) < 0.1
    assert seed.shape == ()
    shards(True, P())  # an error, if replicas might differ
    noise, _ = shards(False, P("x"))
    np.testing.assert_array_equal(*noise[:2])


def test_groups_of_a_partition_draw_noise_of_their_own():
    """Leaves of one shape, each the first of its group."""
    opt = optax.partition({"a": _STOCHASTIC, "b": _STOCHASTIC}, {"a": "a", "b": "b"})
    p = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16).at[0].set(2)}
    updates, _ = opt.update(jax.tree.map(jnp.ones_like, p), opt.init(p), p)
    assert _correlation(*(jnp.asarray(updates[name]) != 0 for name in "ab")) < 0.1
