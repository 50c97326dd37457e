"""Derivatives through a few steps: those of float32, or an error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modes import apply_updates

import adamaxw
from adamaxw import moments

pytestmark = pytest.mark.usefixtures("compile_fast")

_H = {"learning_rate": 0.03, "b1": 0.9, "b2": 0.95, "eps": 1e-2, "weight_decay": 0.1}
_H = {name: jnp.float32(value) for name, value in _H.items()}
_TARGET = jnp.linspace(-1.3, 1.1, 32).reshape(8, 4)
_START = jnp.full((8, 4), 2.0)


def _loss(h, start, shift, dtype, moment_dtype, param_rounding):
    """After five steps, whose gradients fall so that norms decay as well as rise."""
    opt = adamaxw.adamaxw(**h, moment_dtype=moment_dtype, param_rounding=param_rounding)

    def step(carry, size):
        p, state = carry
        updates, state = opt.update((p.astype(jnp.float32) - _TARGET) * size + shift, state, p)
        return (apply_updates(p, updates), state), None

    p = start.astype(dtype)
    (p, _), _ = jax.lax.scan(step, (p, opt.init(p)), 1.0 - 0.15 * jnp.arange(5.0))
    return jnp.sum((p.astype(jnp.float32) - 2 * _TARGET) ** 2)


@functools.cache
def _derivatives(transform, *how):
    derivatives = jax.jit(transform(lambda *x: _loss(*x, *how), (0, 1, 2)))
    return derivatives(_H, _START, jnp.zeros((8, 4)))


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd])
@pytest.mark.parametrize(
    ("dtype", "moment_dtype", "param_rounding"),
    [
        ("float32", "bfloat16", "nearest"),
        ("bfloat16", None, "stochastic"),
        ("bfloat16", None, "exact"),
        ("bfloat16", "bfloat16", "stochastic"),
        ("bfloat16", "bfloat16", "exact"),
    ],
)
def test_derivatives_are_those_of_float32(dtype, moment_dtype, param_rounding, transform):
    """Of hyperparameters, the first parameters and the gradients, in either mode, within 5%."""
    got = _derivatives(transform, dtype, moment_dtype, param_rounding)
    exact = _derivatives(jax.grad, "float32", None, "nearest")
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(x - y) < 0.05 * np.linalg.norm(y)


@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd])
def test_codes_carry_no_derivatives_and_say_so(transform):
    """Rather than 0: in update and in pack, in either mode."""
    for how in (("float32", "uint8", "nearest"), ("bfloat16", "uint8", "exact")):
        with pytest.raises(NotImplementedError, match=r"moment_dtype.*stop_gradient"):
            _derivatives(transform, *how)
    given = moments.Moments(jnp.int32(1), _START, _START)
    with pytest.raises(NotImplementedError, match="uint8"):
        transform(lambda m: moments.pack(given._replace(mu=m), "uint8").nu_scale)(_START)


def test_a_step_of_codes_has_the_derivative_of_the_rate():
    """Where nothing that is differentiated passes through codes, the step is as any other."""
    p, g = jnp.ones(4), jnp.ones(4)

    def loss(lr):
        opt = adamaxw.adamaxw(lr, weight_decay=0.0, moment_dtype="uint8")
        updates, _ = opt.update(g, opt.init(p), p)
        return jnp.sum(updates)

    assert np.isclose(jax.grad(loss)(jnp.float32(0.1)), -4, rtol=0.1)
