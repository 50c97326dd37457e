"""Roundings and codes, bit by bit: plain functions of arrays, each with its derivation.

`noise` is uint32, uniform in [0, 2^16). Derivatives are up to the callers: see `_derivatives`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Noise with which the random roundings round to nearest: the middle of their range.
TO_NEAREST = np.uint32(2**15)


def round_to_bfloat16(x: jax.Array, noise: jax.Array | np.uint32) -> jax.Array:
    """Rounds float32 to bfloat16 at random, without bias.

    bfloat16 is the upper half of a float32. Adding the noise to the lower half carries into the
    upper one with a probability of the lower half / 2^16, so that the mean of the result is x.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jnp.asarray(noise, jnp.uint32)
    high = (bits >> 16).astype(jnp.uint16)
    rounded = lax.bitcast_convert_type(high, jnp.bfloat16)
    # The carry would turn some NaN into zero, and the largest numbers into inf.
    is_less = jnp.abs(x) < np.float32(jnp.finfo(jnp.bfloat16).max)
    return jnp.where(is_less, rounded, x.astype(jnp.bfloat16))


def round_to_float16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Rounds float32 to float16 at random, without bias; see `round_to_bfloat16`."""
    # From 2^-14 on, float16 lacks the last 13 bits of float32.
    bits = lax.bitcast_convert_type(x, jnp.uint32) + (noise >> 3)
    normal = lax.bitcast_convert_type(bits & np.uint32(0xFFFFE000), jnp.float32)
    # Below, it holds the multiples of 2^-24.
    chance = (noise.astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-16
    exact = jnp.abs(x) * 2.0**24
    below = jnp.floor(exact)
    multiple = (below + jnp.where(chance < exact - below, 1.0, 0.0)) * 2.0**-24
    subnormal = jnp.where(x < 0, -multiple, multiple)
    rounded = jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal).astype(jnp.float16)
    is_finite = jnp.isfinite(x) & jnp.isfinite(rounded)
    return jnp.where(is_finite, rounded, x.astype(jnp.float16))


def bits_of(master: jax.Array) -> jax.Array:
    """The bits of a float32 as int32, with a single NaN. Their lower half is the residual."""
    master = _once(jnp.where(jnp.isnan(master), jnp.nan, master))
    return lax.bitcast_convert_type(master, jnp.int32)


def upper(bits: jax.Array, residual: jax.Array) -> jax.Array:
    """The bits without the residual, as float32: the nearest bfloat16, ties away from zero."""
    return lax.bitcast_convert_type(bits - residual.astype(jnp.int32), jnp.float32)


def join(p: jax.Array, residual: jax.Array) -> jax.Array:
    """The float32 whose upper half is `p` (bfloat16) and whose lower half is `residual` (int16)."""
    # If something else has changed `p`, the residual is stale, but moves the result by at most half
    # a bfloat16 step from the new `p`.
    high = lax.bitcast_convert_type(p, jnp.int16).astype(jnp.int32) << 16
    residual = residual.astype(jnp.int32)
    # A zero has no smaller magnitude: the bits of -0 minus 1 are a NaN.
    is_zero = (high & np.int32(2**31 - 1)) == 0
    residual = jnp.where(is_zero, jnp.maximum(residual, 0), residual)
    return lax.bitcast_convert_type(high + residual, jnp.float32)


def nearest_level(u: jax.Array, levels: int) -> jax.Array:
    """The code (uint32) nearest to a norm that was multiplied by `level_unit`, clipped to 0..255.

    `u^levels` doubles from one level to the next, so the code is its float32 exponent field, which
    is 0 on underflow and 255 on overflow.
    """
    return lax.bitcast_convert_type(lax.integer_pow(u, levels), jnp.uint32) >> 23


def level_unit(scale: jax.Array, levels: int) -> jax.Array:
    """The factor for `nearest_level`: maps `scale` to code 0, plus half a level so as to round."""
    return np.float32(2 ** ((0.5 - 127) / levels)) / scale


def signed_root(square: jax.Array, noise: jax.Array | np.uint32) -> jax.Array:
    """A float32 whose integer part q has `square` as the mean of `q |q|` over all noise.

    Beyond 127^2, q is +-127. With `x = |square|` and c uniform in (0, 1), |q| is the integer part
    of `sqrt(x - c (1 - c)) + c`, or 0. For b^2 <= x < (b + 1)^2 that is b + 1 where
    `(1 - c) (2 b + 1) < x - b^2`, else b: the mean of q^2 is x.
    """
    c = jnp.asarray(noise, jnp.int32).astype(jnp.float32) * 2.0**-16 + 2.0**-17
    root = jnp.sqrt(jnp.maximum(jnp.abs(square) + (c * c - c), 0.0))
    size = jnp.minimum(root, 127.0) + c
    return jnp.where(square < 0, -size, size)


def clip_to_half_range(x: jax.Array) -> jax.Array:
    """`x` clipped to +-2^127, half the range of float32; what is not finite stays so."""
    bound = np.asarray(2.0**127, x.dtype)  # a Python float would be float64 under x64
    return jnp.where(jnp.isfinite(x), lax.clamp(-bound, x, bound), x)


def _once(x: jax.Array) -> jax.Array:
    """`x`, computed once: two loops that each recompute it might round it differently."""
    # XLA for CPU and GPU does not duplicate a division, so divide by 1. TPUs run a single loop.
    one = jnp.where(jnp.isnan(x), 2.0, 1.0)
    return lax.platform_dependent(x, one, tpu=lambda x, _: x, default=jnp.divide)
