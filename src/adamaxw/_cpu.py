"""An arrangement of the uint8 step that XLA runs faster on CPUs; the package is correct without."""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamaxw._rule import Constants, cast, shrink

# 2^(z - 1) for 1 <= z < 2, lowest power first: relative error below 5e-5 in sixths, and 1 comes out
# where z - 1 is 96 units of 2^-23.
_EXP2 = np.array([0.4630053, 0.45312125, 0.01027734, 0.07358816], np.float32)
# Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits.
_MAGIC = np.float32(3 * 2**22)


def logarithmic_step(
    fmt: Any, g: jax.Array, stored: Any, scales: Any, noise: Any, constants: Constants
) -> tuple[jax.Array, jax.Array]:
    """`Format.step` of `Logarithmic`, with norms that are not decoded: their codes are compared.

    XLA for CPUs has a loop for each result, and computes in each what it needs. So the loop of `nu`
    subtracts and compares codes, and that of `mu` takes its powers of integers, without `exp`.
    """
    (mu, nu), (scale, new_scale) = stored, scales
    b1, b2, eps = cast(constants, jnp.float32)
    g = g.astype(jnp.float32)
    # The scale rises by whole steps against the decay: all codes fall by their number.
    left = shrink(b2, scale)
    fall = jnp.round(fmt.levels * jnp.log2(new_scale / jnp.abs(left)))  # 0 may be -0
    fall = jnp.clip(fall, -1000, 255).astype(jnp.int32)
    fallen = jnp.minimum(nu.astype(jnp.int32) - fall, 255)
    size, unit = jnp.abs(g), fmt._unit(new_scale)
    risen = jnp.maximum(fmt._level(size * unit + eps * unit).astype(jnp.int32), fallen)
    # The first moment, in the unit of squared codes: of the fallen norm, then of the risen.
    since = scale / (new_scale * jnp.exp2(-fall.astype(jnp.float32) / fmt.levels))
    weight = b1.rest * (np.float32(127**2 / fmt.peak) / new_scale)
    square = fmt._square(mu.astype(jnp.float32))
    m = g * weight * _power(-fallen, fmt.levels) + square * shrink(b1, since)
    m = m * _power(fallen - risen, fmt.levels)
    # A negative scale means that the state is corrupt.
    is_finite = (size < jnp.where((left >= 0) & (since >= 0), jnp.inf, 0.0)) & ~jnp.isnan(m)
    code = jnp.where(is_finite, _compress(m, noise), -128)
    new_mu = jnp.where(mu == -128, mu, code.astype(jnp.int8))
    # `mu` first: it needs the old `nu`, whose buffer the new one can then reuse.
    return new_mu, jnp.where(new_mu == -128, np.asarray(255, nu.dtype), risen.astype(nu.dtype))


def _compress(square: jax.Array, noise: Any) -> jax.Array:
    """`Logarithmic._compress` by selections, as int32: `minimum` takes a CPU three instructions."""
    d = jnp.asarray(noise, jnp.int32).astype(jnp.float32) * 2.0**-16 + (2.0**-17 - 0.5)
    x = jnp.abs(square)
    x = jnp.where(x < 127.0**2, x, 127.0**2) + (d * d - 0.25)
    code = jnp.sqrt(jnp.where(x > 0, x, 0.0)) + d
    nearest = jnp.where(square < 0, -code, code) + _MAGIC
    return lax.bitcast_convert_type(nearest, jnp.int32) - _MAGIC.view(np.int32)


def _power(n: jax.Array, levels: int) -> jax.Array:
    """`2^(n / levels)` to 5e-5 (with 6 levels), exact for 0; n is int32, -510 to 255."""
    # In units of 2^-23, as the exponent of a float32 is counted. The step is an integer, hence
    # too small, so that whole octaves may lack up to 85 units.
    log2 = n * np.int32(2**23 // levels) + np.int32(96)
    fraction = log2 & np.int32(2**23 - 1)
    z = lax.bitcast_convert_type(fraction | np.int32(127 << 23), jnp.float32)
    power = reduce(lambda y, coefficient: y * z + coefficient, _EXP2[::-1])
    bits = lax.bitcast_convert_type(power, jnp.int32) + (log2 - fraction)
    return lax.bitcast_convert_type(bits, jnp.float32)
