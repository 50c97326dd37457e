"""The AdamaxW recurrence on one array: the only place where the formula stands."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


def next_moments(
    g: jax.Array, m: jax.Array, u: jax.Array, *, b1: Scalar, b2: Scalar, eps: Scalar
) -> tuple[jax.Array, jax.Array]:
    """The first two lines of AdamaxW on one array.

    Args:
        g: gradient; floating or complex, of the dtype of `m`.
        m: first moment, of the shape of `g`.
        u: infinity norm, real, of the shape of `g`.
        b1: decay rate of the first moment.
        b2: decay rate of the infinity norm.
        eps: lower bound of the infinity norm.

    Returns:
        The two new moments, in their dtypes.
    """
    return next_first_moment(g, m, b1), jnp.maximum(shrink(b2, u), jnp.abs(g) + eps)


def next_first_moment(g: jax.Array, m: jax.Array, b1: Scalar) -> jax.Array:
    """The first line alone. It holds in any unit that `g` and `m` have in common."""
    # The gradient first, as in Optax: a compiler that fuses the sum then rounds the same product.
    return (1 - b1) * g + shrink(b1, m)


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


def bias_correction(b1: Scalar, t: jax.Array) -> jax.Array:
    """`1 - b1^t` (Kingma & Ba 2015, section 3) for a float scalar `t` >= 1, in the dtype of `t`.

    `1 - b1**t` cancels: at b1=0.9, t=1 it loses two bits in float32, and more as b1 nears 1.
    """
    if isinstance(b1, float):
        with np.errstate(divide="ignore"):  # b1 = 0: log is -inf, and the correction is 1
            return -jnp.expm1(t * float(np.log(b1)))
    # A traced b1 may be 0 and differentiated there: no logarithm of it, also where not chosen.
    log_b1 = jnp.log(jnp.where(b1 < 0.5, 0.5, b1))
    return jnp.where(b1 < 0.5, 1 - b1**t, -jnp.expm1(t * log_b1))


def shrink(b: Scalar, x: jax.Array) -> jax.Array:
    """`b x`, for a Python float near 1 with the digits that float32 cannot hold of it.

    The nearest float32 to 0.999 is off by 1.3e-8, an error that compounds with each step; 1 - b is
    off by far less. Below 1/2 the difference would cancel, and b itself is as exact.
    """
    return x - (1 - b) * x if isinstance(b, float) and b >= 0.5 else b * x


def cast(scalar: Scalar, dtype: Any) -> Scalar:
    """An array in a dtype; a Python float as it is."""
    return scalar.astype(dtype) if isinstance(scalar, jax.Array) else scalar


@jax.tree_util.register_pytree_node_class
class Constants(NamedTuple):
    """The hyperparameters that no schedule changes. Compiled code has numbers as constants.

    There they keep the double precision that `shrink` needs.
    """

    b1: Scalar
    b2: Scalar
    eps: Scalar

    def tree_flatten(self) -> tuple[Any, Any]:
        """Arrays are leaves, numbers part of the structure."""
        arrays = tuple(None if isinstance(x, float) else x for x in self)
        return arrays, tuple(x if isinstance(x, float) else None for x in self)

    @classmethod
    def tree_unflatten(cls, numbers: Any, arrays: Any) -> "Constants":
        """See `tree_flatten`."""
        return cls(*(x if y is None else y for x, y in zip(arrays, numbers, strict=True)))
