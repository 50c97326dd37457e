"""What is compiled, how often, and what the compiled step holds in memory."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import EVERY_MOMENT_DTYPE
from equality import assert_equal
from modes import apply_updates

import adamaxw


@pytest.fixture
def compiled(caplog, compile_fast):
    """A function that returns how many operands each program has that a call compiles."""

    def operands(function, *args):
        caplog.clear()
        with caplog.at_level(logging.WARNING), jax.log_compiles():
            function(*args)
        return [len(r.args[1]) for r in caplog.records if r.msg.startswith("Compiling ")]

    return operands


def _tree(first, dtype=jnp.float32):
    """Eight leaves of two shapes, which no other test has: nothing is compiled for them yet."""
    rng = np.random.default_rng(0)
    shapes = [(first, 11)] * 5 + [(first,)] * 3
    return {f"{i}": jnp.asarray(rng.normal(size=shape), dtype) for i, shape in enumerate(shapes)}


@EVERY_MOMENT_DTYPE
def test_equal_leaves_are_one_function(moment_dtype):
    """The program of a tree has one function for all leaves of a shape that decay, or do not."""

    def functions(params, mask=None):
        opt = adamaxw.adamaxw(1e-3, moment_dtype=moment_dtype, mask=mask)
        lowered = jax.jit(opt.update).lower(params, opt.init(params), params)
        return lowered.as_text().count("func.func")

    params = _tree(7)
    two, four = ({name: params[name] for name in names} for names in ("07", "0167"))
    assert functions(params) == functions(two) > functions({"0": params["0"]})
    many, few = ({name: name in "0246" for name in tree} for tree in (params, four))
    assert functions(params, many) == functions(four, few) > functions(params)


@pytest.mark.parametrize(("moment_dtype", "first"), [(None, 21), ("bfloat16", 22), ("uint8", 23)])
def test_an_eager_step_is_one_program(compiled, moment_dtype, first):
    """Also for arrays of NumPy, as of a checkpoint; a sweep over hyperparameters compiles once."""
    params = _tree(first)
    make = functools.partial(adamaxw.adamaxw, moment_dtype=moment_dtype)
    state = make(0.1).init(params)
    assert max(compiled(make(0.1).update, params, state, params)) >= 3 * len(params)
    for lr, b1, b2, eps, wd in ((0.2, 0.8, 0.99, 1e-7, 0.2), (np.float32(0.3), 0.7, 0.9, 1e-6, 0)):
        opt = make(lr, b1, b2, eps, wd)
        assert compiled(opt.update, params, state, params) == []
    opt, host = make(0.1), jax.tree.map(np.asarray, (params, state, params))
    got = opt.update(*host)
    assert_equal(got, opt.update(params, state, params))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))


def test_injected_hyperparameters_are_compiled_once(compiled):
    """optax.inject_hyperparams builds the optimizer anew at each step, with arrays."""
    params = _tree(24)
    opt = optax.inject_hyperparams(adamaxw.adamaxw)(1e-2, b1=0.8, weight_decay=0.0)
    state = opt.init(params)
    assert max(compiled(opt.update, params, state, params)) >= 3 * len(params)
    before, _ = opt.update(params, state, params)
    state.hyperparams["learning_rate"] = jnp.float32(1e-3)
    assert compiled(opt.update, params, state, params) == []
    after, _ = opt.update(params, state, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 10 * b, rtol=1e-5), before, after)


def test_an_eager_tree_of_many_leaves_goes_leaf_by_leaf(compiled):
    """XLA would take minutes for one program; the numbers are those of the first leaves alone."""
    params = {f"{i:03}": jnp.linspace(-1.0, 1.0, 25) for i in range(600)}
    first = {name: params[name] for name in ("000", "001")}
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8")
    state = opt.init(params)
    assert max(compiled(opt.update, params, state, params)) < 30
    updates, _ = opt.update(params, state, params)
    expected, _ = opt.update(first, opt.init(first)._replace(seed=state.seed), first)
    assert_equal({name: updates[name] for name in first}, expected)


@pytest.mark.usefixtures("compile_fast")
@EVERY_MOMENT_DTYPE
def test_an_eager_step_of_a_tree_over_several_devices(moment_dtype):
    """Each leaf is updated where it lies, also if it was placed after init, or has no gradient."""
    params = {name: leaf for name, leaf in _tree(12).items() if name in "017"}
    places = {name: jax.devices()[int(name) % 2] for name in params}
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moment_dtype)
    expected, expected_state = opt.update(params, opt.init(params), params)
    apart = jax.tree.map(jax.device_put, params, places)
    for state in (opt.init(apart), opt.init(params)):
        updates, state = opt.update(apart, state, apart)
        assert_equal((updates, state), (expected, expected_state))
        for tree in (updates, state.mu, state.nu):
            assert {name: tree[name].device for name in params} == places
    _, state = opt.update(apart | {"1": None}, state, apart)
    updates, state = opt.update(apart | {"0": None}, state, apart)
    assert state.count == 3
    assert updates["1"].device == places["1"]


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA of that time makes a float32 temporary for bfloat16"
)
@EVERY_MOMENT_DTYPE
def test_the_compiled_step_has_no_temporaries(moment_dtype):
    """Donated float32 parameters and their moments are updated in place, in one pass."""
    params = jnp.zeros((256, 1000))
    opt = adamaxw.adamaxw(1e-3, moment_dtype=moment_dtype)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    compiled = step.lower(params, opt.init(params), params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes / params.size < 0.01
