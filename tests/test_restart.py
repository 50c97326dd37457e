"""Optimizers that begin anew during training, and noise that is each run's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import run, states_in
from equality import assert_equal, types_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from modes import apply_updates

import adamaxw
from adamaxw import moments

pytestmark = pytest.mark.usefixtures("compile_fast")

_BEGIN = {
    "init": lambda opt, p, _: opt.init(p),
    "restart": lambda opt, _, state: moments.restart(state),
    "replace": lambda opt, p, state: opt.init(p)._replace(residual=state.residual),
}


@pytest.mark.parametrize(
    ("moment_dtype", "param_rounding", "begin", "n"),
    [
        ("bfloat16", "stochastic", "init", 4096),
        (None, "stochastic", "restart", 4096),
        (None, "stochastic", "restart", 1),
        ("uint8", "exact", "restart", 4096),
        ("uint8", "exact", "replace", 4096),
    ],
)
def test_a_fresh_optimizer_now_and_again_does_not_freeze(moment_dtype, param_rounding, begin, n):
    """The inner loops of DiLoCo: 500 steps of 1e-4, a hundred fresh starts, all at 0.95.

    A single parameter draws other noise after a restart, even where it has not moved.
    """
    opt = adamaxw.adamaxw(
        1e-4, weight_decay=0.0, moment_dtype=moment_dtype, param_rounding=param_rounding
    )

    @jax.jit
    def train(p, state):
        def step(_, carry):
            p, state = carry
            updates, state = opt.update(jnp.ones_like(p), state, p)
            return apply_updates(p, updates), state

        return jax.lax.fori_loop(0, 5, step, (p, state))

    p = jnp.ones(n, jnp.bfloat16)
    state = opt.init(p)
    for _ in range(100):
        p, state = train(p, _BEGIN[begin](opt, p, state))
    p = np.asarray(p, np.float32)
    # 13 or so steps of 1/256, each of which comes by chance.
    assert abs(p.mean() - 0.95) < (1e-2 if n > 1 else 4e-2)
    assert p.std() < 0.02
    assert p.max() < 1


@pytest.mark.parametrize("moment_dtype", [None, "uint8"])
def test_restart_inside_wrappers(moment_dtype):
    """Every AdamaxState in the state of a wrapper starts anew, and nothing else changes."""
    inner = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype, param_rounding="exact")
    opt = optax.MultiSteps(optax.partition({"a": inner, "b": inner}, {"a": "a", "b": "b"}), 2)
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = run(opt, params, [1.0] * 3)
    new = moments.restart(state)
    assert types_of(new) == types_of(state)
    assert new.mini_step == 1
    for old, began in zip(states_in(state), states_in(new), strict=True):
        assert (old.count, began.count) == (1, 0)
        assert not any(x.any() for x in jax.tree.leaves((began.mu, began.nu)))
        assert_equal(began.residual, old.residual)
        assert old.seed is None or began.seed != old.seed


def _noise(opt, p):
    """How a first step rounds parameters at 1, as 0 and 1."""
    updates, _ = opt.update(jnp.ones_like(p), opt.init(p), p)
    return jnp.asarray(updates) != 0


def _correlation(a, b):
    return abs(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


_STOCHASTIC = adamaxw.adamaxw(2e-3, weight_decay=0.0, param_rounding="stochastic")


def test_replicas_and_groups_draw_noise_of_their_own():
    """Under vmap and in a partition, where parameters differ."""
    p = jnp.ones((2, 4096), jnp.bfloat16)
    other = p.at[1, 0].set(2)
    assert _correlation(*jax.vmap(lambda p: _noise(_STOCHASTIC, p))(other)) < 0.1
    opt = optax.partition({"a": _STOCHASTIC, "b": _STOCHASTIC}, {"a": "a", "b": "b"})
    p = dict(zip("ab", other, strict=True))
    updates, _ = opt.update(jax.tree.map(jnp.ones_like, p), opt.init(p), p)
    assert _correlation(*(updates[name] != 0 for name in "ab")) < 0.1


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
