"""An arrangement of the uint8 step that XLA runs faster on CPUs.

Without it the package is correct. It restates `_rule.next_moments` in units of codes.
"""

from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamaxw._bits import level_unit, nearest_level
from adamaxw._rule import Constants, cast, shrink

# 2^(z - 1) for 1 <= z < 2, lowest power first. The relative error is below 5e-5 at multiples of
# 1/6, and the result is exactly 1 where z - 1 is 96 units of 2^-23.
_EXP2 = np.array([0.4630053, 0.45312125, 0.01027734, 0.07358816], np.float32)
# Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits.
_MAGIC = np.float32(3 * 2**22)


def logarithmic_step(
    fmt: Any, g: jax.Array, stored: Any, scales: Any, noise: Any, constants: Constants
) -> tuple[jax.Array, jax.Array]:
    """`Format.step` of `Logarithmic`; compares the codes of norms without decoding them."""
    # XLA for CPUs makes a loop for each result, which computes all that the result needs. So the
    # loop for `nu` subtracts and compares codes, and the one for `mu` takes powers of integers
    # instead of `exp`.
    (mu, nu), (scale, new_scale) = stored, scales
    b1, b2, eps = cast(constants, jnp.float32)
    g = g.astype(jnp.float32)
    # The scale decays by b2, then is raised by `fall` levels: every code drops by `fall`.
    left = shrink(b2, scale)
    fall = jnp.round(fmt.levels * jnp.log2(new_scale / jnp.abs(left)))  # 0 may be -0
    fall = jnp.clip(fall, -1000, 255).astype(jnp.int32)
    fallen = jnp.minimum(nu.astype(jnp.int32) - fall, 255)
    size, unit = jnp.abs(g), level_unit(new_scale, fmt.levels)
    level = nearest_level(size * unit + eps * unit, fmt.levels)
    risen = jnp.maximum(level.astype(jnp.int32), fallen)
    # The first moment in units of squared codes, relative to the decayed norm, then to the new one.
    since = scale / (new_scale * jnp.exp2(-fall.astype(jnp.float32) / fmt.levels))
    weight = b1.rest * (np.float32(127**2 / fmt.peak) / new_scale)
    code = mu.astype(jnp.float32)
    square = code * jnp.abs(code)
    m = g * weight * _power(-fallen, fmt.levels) + square * shrink(b1, since)
    m = m * _power(fallen - risen, fmt.levels)
    # A negative scale means that the state is corrupt.
    is_finite = (size < jnp.where((left >= 0) & (since >= 0), jnp.inf, 0.0)) & ~jnp.isnan(m)
    code = jnp.where(is_finite, _signed_root(m, noise), -128)
    new_mu = jnp.where(mu == -128, mu, code.astype(jnp.int8))
    # Compute `mu` first: it still needs the old `nu`, whose buffer the new `nu` can then reuse.
    return new_mu, jnp.where(new_mu == -128, np.asarray(255, nu.dtype), risen.astype(nu.dtype))


def _signed_root(square: jax.Array, noise: Any) -> jax.Array:
    """`_bits.signed_root` as int32, by selections: `minimum` costs three instructions on a CPU."""
    d = jnp.asarray(noise, jnp.int32).astype(jnp.float32) * 2.0**-16 + (2.0**-17 - 0.5)
    x = jnp.abs(square)
    x = jnp.where(x < 127.0**2, x, 127.0**2) + (d * d - 0.25)
    code = jnp.sqrt(jnp.where(x > 0, x, 0.0)) + d
    nearest = jnp.where(square < 0, -code, code) + _MAGIC
    return lax.bitcast_convert_type(nearest, jnp.int32) - _MAGIC.view(np.int32)


def _power(n: jax.Array, levels: int) -> jax.Array:
    """`2^(n / levels)` to 5e-5 (with 6 levels), exact for 0; n is int32, -510 to 255."""
    # log2 in units of 2^-23, the last bit of a float32 exponent. The integer step rounds down:
    # 96 more units keep whole octaves, which lack up to 85 units, from falling one short.
    log2 = n * np.int32(2**23 // levels) + np.int32(96)
    fraction = log2 & np.int32(2**23 - 1)
    z = lax.bitcast_convert_type(fraction | np.int32(127 << 23), jnp.float32)
    power = reduce(lambda y, coefficient: y * z + coefficient, _EXP2[::-1])
    bits = lax.bitcast_convert_type(power, jnp.int32) + (log2 - fraction)
    return lax.bitcast_convert_type(bits, jnp.float32)
