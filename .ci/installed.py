"""Trains a few steps with the installed wheel, which must need nothing but its dependencies."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import adamaxw

EXTRAS = ("equinox", "flax", "keras", "matplotlib", "pytest", "rich")
STEPS = 200


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared error of a small network."""
    hidden = jnp.tanh(x @ params["hidden"].astype(jnp.float32))
    return jnp.mean((hidden @ params["out"].astype(jnp.float32) - y) ** 2)


def main() -> None:
    """Trains with bfloat16 parameters and 2 bytes of state per parameter."""
    package = Path(adamaxw.__file__)
    assert package.is_relative_to(sys.prefix), f"{package} is not the installed package"
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    assert not present, f"this environment is not empty: {present}"

    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(x[:, :1]) + x[:, 1:2]
    params = {
        "hidden": 0.3 * jax.random.normal(keys[1], (8, 32), jnp.bfloat16),
        "out": 0.1 * jax.random.normal(keys[2], (32, 1), jnp.bfloat16),
    }
    opt = adamaxw.adamaxw(
        1e-2, moment_dtype="uint8", param_rounding="stochastic", mask=adamaxw.masks.matrices
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, x, y)
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, before = opt.init(params), loss(params, x, y)
    for _ in range(STEPS):
        params, state = step(params, state)
    after = loss(params, x, y)
    assert after < 0.2 * before, f"the loss was {before:.4f} and is {after:.4f}"
    adamaxw.diagnostics(*opt.update(params, state, params), params)
    print(f"{package.parent}: loss {before:.4f} to {after:.4f} in {STEPS} steps")


if __name__ == "__main__":
    main()
