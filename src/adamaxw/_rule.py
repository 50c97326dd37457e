"""The AdamaxW recurrence on one array: the only place where the formula stands."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A Python float keeps its double precision until it meets an array; arrays may be traced.
Scalar = float | jax.Array


# With `t` counting from 1, `lr` the learning rate and `wd` the weight decay:
#
#     m_t    = b1 m_{t-1} + (1 - b1) g_t
#     u_t    = max(b2 u_{t-1}, |g_t| + eps)
#     step_t = -lr / (1 - b1^t) * m_t / u_t  -  lr wd p_{t-1}
#
# Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 2 (AdaMax), with
# eps inside the maximum as in PyTorch and Optax; Loshchilov & Hutter, "Decoupled Weight Decay
# Regularization", ICLR 2019, Algorithm 2, line 12.


class Decay(NamedTuple):
    """A decay rate b, with the digits that float32 cannot hold of a b near 1.

    The nearest float32 to 0.999 is off by 1.3e-8, an error that compounds with each step; that of
    1 - b is off by far less.

    Attributes:
        b: the rate; None for a number from 1/2, for which `rest` says it better.
        rest: `1 - b`.
    """

    b: Scalar | None
    rest: Scalar

    @classmethod
    def of(cls, b: Scalar) -> "Decay":
        """The rate of a number or an array."""
        return cls(None if isinstance(b, float) and b >= 0.5 else b, 1 - b)


class Constants(NamedTuple):
    """The hyperparameters that no schedule changes."""

    b1: Decay
    b2: Decay
    eps: Scalar


def next_moments(
    g: jax.Array, m: jax.Array, u: jax.Array, constants: Constants
) -> tuple[jax.Array, jax.Array]:
    """The first two lines of AdamaxW on one array.

    Args:
        g: gradient; floating or complex, of the dtype of `m`.
        m: first moment, of the shape of `g`.
        u: infinity norm, real, of the shape of `g`.
        constants: in the dtypes of `m`, `u` and `u`.

    Returns:
        The two new moments, in their dtypes.
    """
    b1, b2, eps = constants
    # The gradient first, as in Optax: a compiler that fuses the sum then rounds the same product.
    return b1.rest * g + shrink(b1, m), jnp.maximum(shrink(b2, u), jnp.abs(g) + eps)


def next_step(ratio: jax.Array, p: jax.Array | None, *, rate: Scalar, decay: Scalar) -> jax.Array:
    """The last line of AdamaxW on one array: what to add to the parameter.

    Args:
        ratio: `m / u`, of order 1: divided first, no intermediate under- or overflows.
        p: parameter, of the dtype of `ratio`, or None where it does not decay.
        rate: `lr / (1 - b1^t)`; for the divisor see `bias_correction`.
        decay: `lr * wd`, or `wd` alone where the decay is not scaled by the learning rate.
    """
    step = -rate * ratio
    return step if p is None else step - decay * p


def bias_correction(b1: Decay, t: jax.Array) -> jax.Array:
    """`1 - b1^t` (Kingma & Ba 2015, section 3) for a float scalar `t` >= 1, in the dtype of `t`.

    `1 - b1**t` cancels: at b1=0.9, t=1 it loses two bits in float32, and more as b1 nears 1.
    """
    if (b := b1.b) is None:
        return -jnp.expm1(t * jnp.log1p(-jnp.asarray(b1.rest, t.dtype)))
    # A traced b1 may be 0 and differentiated there: no logarithm of it, also where not chosen.
    log_b1 = jnp.log(jnp.where(b < 0.5, 0.5, b))
    return jnp.where(b < 0.5, 1 - b**t, -jnp.expm1(t * log_b1))


def shrink(b: Decay, x: jax.Array) -> jax.Array:
    """`b x`."""
    return x - b.rest * x if b.b is None else b.b * x


def cast(scalars: Any, dtype: Any) -> Any:
    """A tree of scalars with its arrays in a dtype; Python floats as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if isinstance(x, jax.Array) else x, scalars)
