"""The AdamaxW recurrence on one array: its one definition, for every format and dtype.

On CPUs the uint8 format runs `_cpu` instead, which restates the first two lines in codes.
"""

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


class DecayRate(NamedTuple):
    """b1 or b2, as b and 1 - b. b is None for a Python float of at least 1/2: use `rest` alone."""

    # The float32 nearest to 0.999 is off by 1.3e-8, an error that compounds with each step; the
    # one nearest to 1 - 0.999 is off by far less.
    b: Scalar | None
    rest: Scalar

    @classmethod
    def of(cls, b: Scalar) -> "DecayRate":
        """The rate of a number or an array."""
        return cls(None if isinstance(b, float) and b >= 0.5 else b, 1 - b)


class Constants(NamedTuple):
    """The hyperparameters that cannot be functions of the count."""

    b1: DecayRate
    b2: DecayRate
    eps: Scalar


def next_moments(
    g: jax.Array, m: jax.Array, u: jax.Array, constants: Constants
) -> tuple[jax.Array, jax.Array]:
    """The first two lines of AdamaxW on arrays of one shape: the new `m` and `u`, in their dtypes.

    The gradient `g` has the dtype of `m`, floating or complex; `u` is real. The constants have the
    dtypes of `m`, `u` and `u`.
    """
    b1, b2, eps = constants
    # Add in Optax's order, so that a fused multiply-add rounds the same one of the two products.
    return b1.rest * g + shrink(b1, m), jnp.maximum(shrink(b2, u), jnp.abs(g) + eps)


def next_step(
    ratio: jax.Array, p: jax.Array | None, *, step_size: Scalar, decay_factor: Scalar
) -> jax.Array:
    """The last line of AdamaxW on one array: what to add to the parameter `p`.

    The ratio is `m / u`, of order 1: divided first, no intermediate result under- or overflows.
    `step_size` is `lr / (1 - b1^t)`, `decay_factor` is `lr wd`, or `wd` alone where decay is not
    scaled by the learning rate. `p` is None where it does not decay.
    """
    step = -step_size * ratio
    return step if p is None else step - decay_factor * p


def bias_correction(b1: DecayRate, t: jax.Array) -> jax.Array:
    """`1 - b1^t` (Kingma & Ba 2015, section 3) for a float scalar `t` >= 1, in the dtype of `t`.

    `1 - b1**t` cancels: at b1=0.9, t=1 it loses two bits in float32, and more as b1 nears 1.
    """
    if (b := b1.b) is None:
        return -jnp.expm1(t * jnp.log1p(-jnp.asarray(b1.rest, t.dtype)))
    # A traced b1 may be 0: its logarithm must not be differentiated even where it is not selected.
    log_b1 = jnp.log(jnp.where(b < 0.5, 0.5, b))
    return jnp.where(b < 0.5, 1 - b**t, -jnp.expm1(t * log_b1))


def shrink(b: DecayRate, x: jax.Array) -> jax.Array:
    """`b x`."""
    return x - b.rest * x if b.b is None else b.b * x


def cast(scalars: Any, dtype: Any) -> Any:
    """A tree of scalars with its arrays in a dtype; Python floats as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if isinstance(x, jax.Array) else x, scalars)
