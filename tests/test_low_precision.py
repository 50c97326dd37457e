"""Few bits and bfloat16 parameters together: in Optax's wrappers, their noise, their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, types_of
from modes import apply_updates

import adamaxw

_STOCHASTIC, _EXACT = ("uint8", "stochastic"), ("bfloat16", "exact")


def _make(config):
    return adamaxw.adamaxw(1e-2, weight_decay=0.1, moment_dtype=config[0], param_rounding=config[1])


def _random(seed, dtype):
    """Values on no grid, so that every rounding has an effect."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(3, 4)), dtype)


def _step_of(opt):
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    return step


def _ours(state):
    """The AdamaxState inside the state of a wrapper."""

    def is_ours(node):
        return isinstance(node, adamaxw.AdamaxState)

    return next(filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours)))


_BRANCHING = {
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 2),
    "conditionally_mask": lambda opt: optax.conditionally_mask(opt, lambda step: step % 3 != 1),
    "MultiSteps": lambda opt: optax.MultiSteps(opt, 2, should_skip_update_fn=optax.skip_not_finite),
}


@pytest.mark.usefixtures("standard_promotion", "compile_fast")
@pytest.mark.parametrize("config", [_STOCHASTIC, _EXACT], ids=str)
@pytest.mark.parametrize("wrapper", _BRANCHING)
def test_wrappers_that_branch(wrapper, config):
    """Types do not change, and a skipped NaN step leaves params and state as they were.

    Two of the wrappers select between updates and zeros in the dtype of the gradients, so "exact",
    whose updates are float32, needs float32 gradients there.
    """
    opt, params = _BRANCHING[wrapper](_make(config)), _random(0, "bfloat16")
    gradients = [_random(i, "float32" if config == _EXACT else "bfloat16") for i in range(1, 5)]
    if config == _EXACT and wrapper == "MultiSteps" and not hasattr(opt, "_accumulator_dtype"):
        pytest.skip("before Optax 0.2.8 MultiSteps itself fails where the dtypes differ")
    if config == _EXACT and wrapper != "MultiSteps":
        with pytest.raises(TypeError, match=r"(?s)bfloat16.*float32|float32.*bfloat16"):
            jax.eval_shape(opt.update, _random(1, "bfloat16"), opt.init(params), params)
    step = jax.jit(_step_of(opt))

    def trained(gradients):
        run = params, opt.init(params)
        for g in gradients:
            types = types_of(run)
            run = step(*run, g)
            assert types_of(run) == types
        return run[0], _ours(run[1])

    clean = trained(gradients)
    assert not np.array_equal(clean[0], params)
    if wrapper != "conditionally_mask":
        bad = gradients[0].at[0, :1].set(jnp.nan)
        assert_equal(trained([*gradients[:3], bad, gradients[3]]), clean)
    assert step._cache_size() == 1


def test_optax_finds_the_copies_of_params():
    """`optax.tree.map_params` maps residuals too: int8 zeros stand in for missing ones."""
    opt = _make(("uint8", "exact"))
    state = opt.init({"s": jnp.ones(2), "w": jnp.ones(2, jnp.bfloat16)})
    names = {"s": "S", "w": "W"}
    named = optax.tree.map_params(
        opt, lambda _, name: name, state, names, transform_non_params=lambda _: "other"
    )
    assert named == adamaxw.AdamaxState("other", names, names, "other", names, "other")
    residual = optax.tree.get(state, "residual")
    assert {name: x.dtype for name, x in residual.items()} == {"s": "int8", "w": "int16"}


def test_noise_depends_on_the_index_among_trained_leaves():
    """Integer leaves and leaves without gradient do not count; equal leaves get other noise."""
    opt = _make(_STOCHASTIC)
    p = jnp.asarray(np.random.default_rng(1).normal(size=64), jnp.bfloat16)
    g = p.astype(jnp.float32)

    def trained(params, grads):
        state = opt.init(params)._replace(seed=jnp.uint32(7))
        updates, state = opt.update(grads, state, params)
        return list(zip(updates, state.mu, strict=True))

    first, second = trained([p, p], [g, g])
    zeros = np.zeros(3, jax.dtypes.float0)
    among_others = trained([np.arange(3), p, p, p], [zeros, g, None, g])
    assert_equal([among_others[1], among_others[3]], [first, second])
    assert all(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_moments_and_parameters_are_rounded_with_independent_noise():
    """The codes of the first moment, of two values each, do not correlate with the updates."""
    p = jnp.ones(4096, jnp.bfloat16)
    opt = adamaxw.adamaxw(1e-3, moment_dtype="uint8", param_rounding="stochastic")
    updates, state = opt.update(jnp.ones(4096), opt.init(p), p)
    assert abs(np.corrcoef(updates, state.mu)[0, 1]) < 5 / np.sqrt(4096)


# Temporary bytes per parameter of a step, as XLA on the CPU reports them.
_TEMPORARY = {
    (None, "nearest"): 0.1,
    ("uint8", "stochastic"): 2.1,
    ("bfloat16", "stochastic"): 4.1,
    (None, "exact"): 4.2,
    ("uint8", "exact"): 6.2,
    ("bfloat16", "exact"): 8.2,
}


@pytest.mark.parametrize("grad_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", _TEMPORARY, ids=str)
def test_memory_of_a_step(config, grad_dtype):
    """Donated params and state are updated in place, with no float32 temporaries."""
    opt = _make(config)
    params, grads = (jax.ShapeDtypeStruct((1000, 1000), d) for d in ("bfloat16", grad_dtype))
    state = jax.eval_shape(opt.init, params)
    step = jax.jit(_step_of(opt), donate_argnums=(0, 1))
    memory = step.lower(params, state, grads).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say what memory a program takes")
    assert memory.temp_size_in_bytes / params.size < _TEMPORARY[config]
    # The scalars may be anywhere.
    donated = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
    assert memory.alias_size_in_bytes >= donated - 8
