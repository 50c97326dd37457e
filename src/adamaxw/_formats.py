"""How the moments of a leaf are stored between steps: the only file that knows a format by name.

Two facts make few bits enough for AdaMax; `docs/numerics.md` proves them.

- `u_t = max(b2 u_{t-1}, |g_t| + eps)` decays for all elements at once. Stored as `u = scale w`,
  with the decay taken out of the one `scale`, `w` only ever rises, and rounding it commutes with
  the maximum: what is stored is the exact norm rounded once, however many steps it took.
- `|m_t|` is at most about `u_t`, so the ratio of the two has a fixed range, element by element.
"""

# A jitted method overrides one that is not.
# pyright: reportIncompatibleMethodOverride=false

import contextlib
import math
import reprlib
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from adamaxw import _cpu
from adamaxw._derivatives import straight_through, without_derivatives
from adamaxw._rule import Constants, cast, next_moments

# Noise for `encode` that rounds to the nearest: half of the range of 16 bits.
TO_NEAREST = np.uint32(2**15)


def arithmetic(dtype: Any) -> Any:
    """The real dtype that gradients or parameters of an inexact dtype are computed in."""
    return jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32


@dataclass(frozen=True)
class Format:
    """A way to store moments; this one stores them as they are.

    Float32, float64 for 64-bit parameters, the first moment complex for complex ones. All methods
    but `rescale` work on one leaf, element by element. Before the first step a state holds zeros of
    `dtypes` and the scale `rescale(eps, eps)`.

    Attributes:
        name: the `moment_dtype` that stands for it.
        eps_range: of the eps for which norms of ordinary gradients are in range.
        has_scale: whether there is a scale.
        is_noisy: whether `encode` rounds at random.
    """

    name: ClassVar[str | None] = None
    eps_range: ClassVar[tuple[float, float]] = (0.0, np.inf)
    has_scale: ClassVar[bool] = False
    is_noisy: ClassVar[bool] = False

    def dtypes(self, dtype: Any) -> Any:
        """Dtypes of `mu` and `nu` for parameters of an inexact dtype; None if it has none."""
        norm = arithmetic(dtype)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return (jnp.complex128 if norm == jnp.float64 else jnp.complex64), norm
        return norm, norm

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """`scale` moved by whole steps of the grid to where norms of at least `eps` are in range.

        Args:
            scale: float32 scalar, not negative; from 0 it starts anew.
            eps: float32 scalar.

        Returns:
            The scale to encode with, a float32 scalar; None in a format that has none.
        """
        del scale, eps

    def encode(self, m: jax.Array, u: jax.Array, scale: Any, noise: Any) -> tuple[Any, Any]:
        """Stores a first moment and a norm; `noise` is uint32, uniform in [0, 2^16)."""
        del scale, noise
        return m, u

    def decode(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> tuple[Any, Any]:
        """The first moment and the norm that `encode` has stored with this scale.

        In `dtype`, float32 or float64, unless they are stored in the dtype of the arithmetic. From
        a scale of 0, which is that of a state set to zeros, the norm is 0.
        """
        del scale, dtype
        return mu, nu

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        """The first of the two over the second."""
        m, u = self.decode(mu, nu, scale, dtype)
        return m / u.astype(m.dtype)

    def saturated(self, mu: jax.Array, nu: jax.Array) -> dict[str, jax.Array]:
        """Which norms are at the upper bound of the format, as 'saturated', if it has one."""
        del mu, nu
        return {}

    def step(
        self,
        g: jax.Array,
        stored: tuple[jax.Array, jax.Array],
        scales: tuple[Any, Any],
        noise: Any,
        constants: Constants,
    ) -> tuple[jax.Array, jax.Array]:
        """The moments after a gradient: decoded, those of `_rule.next_moments`, and encoded.

        Args:
            g: gradient, of any inexact dtype that the format is for.
            stored: `mu` and `nu`.
            scales: the scale they are stored with, and the one to encode with.
            noise: as in `encode`.
            constants: those of `_rule.next_moments`.

        Returns:
            The new `mu` and `nu`.
        """
        m, u = self.decode(*stored, scales[0], arithmetic(g.dtype))
        b1, b2, eps = constants
        constants = Constants(cast(b1, m.dtype), cast(b2, u.dtype), cast(eps, u.dtype))
        m, u = next_moments(g.astype(m.dtype), m, u, constants)
        return self.encode(m, u, scales[1], noise)


@dataclass(frozen=True)
class BFloat16(Format):
    """4 bytes per parameter: bfloat16 `m`, and `w` in bfloat16 with `u = scale w`, 1 <= scale < 2.

    When the scale falls below 1, every w halves, which is exact. `m` is rounded at random: to the
    nearest, it would stay where it is once `1 - b1` is below 1/512.
    """

    name: ClassVar[str | None] = "bfloat16"
    has_scale: ClassVar[bool] = True
    is_noisy: ClassVar[bool] = True

    def dtypes(self, dtype: Any) -> tuple[Any, Any] | None:
        is_real = jnp.issubdtype(dtype, jnp.floating)
        return (jnp.bfloat16, jnp.bfloat16) if is_real else None

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        del eps
        fixed = lax.stop_gradient(jnp.where(scale == 0, 1.0, scale))
        fraction, _ = jnp.frexp(fixed)  # in [1/2, 1)
        # A product with a power of two, so that it has the derivative of one.
        moved = scale * (2 * fraction / fixed)
        return jnp.where(scale == 0, 1.0, moved)

    @partial(jax.jit, static_argnums=0)
    def encode(self, m: jax.Array, u: jax.Array, scale: Any, noise: Any) -> tuple[Any, Any]:
        # Half of the largest number: rounding, and the unit of a later scale, add to it.
        m, u = (_clipped(x).astype(jnp.float32) for x in (m, u))
        w = (u * (1 / scale)).astype(jnp.bfloat16)
        # What makes `scale w` have the derivative of u, also with respect to the scale.
        exact = (u - lax.stop_gradient(w.astype(jnp.float32)) * scale) / lax.stop_gradient(scale)
        return round_to_bfloat16(m, noise), straight_through(exact, w)

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> tuple[Any, Any]:
        """See `Format`. A scale of another format, or none at all, makes the norm NaN."""
        is_scale = ((scale >= 1) & (scale < 2)) | (scale == 0)
        scale = jnp.where(is_scale, scale, jnp.nan)
        return mu.astype(dtype), (nu.astype(jnp.float32) * scale).astype(dtype)


@dataclass(frozen=True)
class Logarithmic(Format):
    """2 bytes a parameter: `nu` on a logarithmic grid, `mu` as the ratio of the two moments.

    - `nu`, uint8, a code c: `u = scale 2^(c / levels)`, with the scale within half a level of eps.
    - `mu`, int8, a code q: `m = u peak sign(q) (q / 127)^2`, rounded at random between two
      neighbours, without bias. Where `|m|` exceeds `peak u` it is clipped. -128 stands for what is
      not finite.

    Attributes:
        levels: levels of the norm an octave.
        peak: the largest ratio |m| / u. At the defaults 1.01 occurs, and rounding u adds 6%.
    """

    levels: int = 6
    peak: float = 1.25
    name: ClassVar[str | None] = "uint8"
    # Norms up to 620, and none that float32 cannot hold.
    eps_range: ClassVar[tuple[float, float]] = (1e-10, 1e25)
    has_scale: ClassVar[bool] = True
    is_noisy: ClassVar[bool] = True

    def dtypes(self, dtype: Any) -> tuple[Any, Any] | None:
        return (jnp.int8, jnp.uint8) if jnp.issubdtype(dtype, jnp.floating) else None

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        steps = jnp.round(self.levels * jnp.log2(eps / scale))
        moved = scale * jnp.exp2(steps / self.levels)
        return jnp.where((scale > 0) & (moved > 0) & (moved < jnp.inf), moved, eps)

    @partial(jax.jit, static_argnums=0)
    def encode(self, m: jax.Array, u: jax.Array, scale: Any, noise: Any) -> tuple[Any, Any]:
        if m.dtype == jnp.float64:
            m, u = _clipped(m), _clipped(u)
        m, u = m.astype(jnp.float32), u.astype(jnp.float32)
        # One code from the other, as it is stored: else XLA for TPU makes two kernels.
        nu = self._level(u * self._unit(scale)).astype(jnp.uint8)
        square = m * (np.float32(127**2 / self.peak) / scale) * self._power(nu, -1)
        mu = jnp.where(jnp.isfinite(m), self._compress(square, noise), -128.0)
        return without_derivatives((mu.astype(jnp.int8), nu), (m, u, scale))

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> tuple[Any, Any]:
        scale = jnp.where(scale < 0, jnp.nan, scale)
        u = (self._power(nu) * scale).astype(dtype)
        return self.ratio(mu, nu, scale, dtype) * u, u

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        del nu, scale
        q = mu.astype(jnp.float32)
        square = jnp.where(q == -128, jnp.nan, self._square(q))
        return (square * np.float32(self.peak / 127**2)).astype(dtype)

    def saturated(self, mu: jax.Array, nu: jax.Array) -> dict[str, jax.Array]:
        """See `Format`. What is not finite has the largest norm, too."""
        return {"saturated": (nu == 255) & (mu != -128)}

    def step(self, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        """See `Format`. A gradient above the range of norms counts as the largest in range."""
        g, stored, scales, noise, constants = lax.stop_gradient(arguments)
        g = g.astype(arithmetic(g.dtype))
        size, largest = jnp.abs(g), scales[1] * np.float32(2 ** (255 / self.levels))
        bounded = jnp.minimum(size, largest.astype(g.dtype))  # XLA for TPU lays out `clip` worse
        g = jnp.where(size < jnp.inf, jnp.where(g < 0, -bounded, bounded), g)
        cpu, inputs = partial(_cpu.logarithmic_step, self), (g, stored, scales, noise, constants)
        codes = lax.platform_dependent(*inputs, cpu=cpu, default=super().step)
        return without_derivatives(codes, arguments)

    def _unit(self, scale: Any) -> jax.Array:
        """What a norm is multiplied by for `_level`."""
        return np.float32(2 ** ((0.5 - 127) / self.levels)) / scale

    def _level(self, u: jax.Array) -> jax.Array:
        """The nearest level to a norm in `_unit`, uint32: 0 or 255 beyond the range."""
        # From level to level `u^levels` doubles. So the level is the exponent of that float32: 0
        # for what is too small, 255 for inf.
        return lax.bitcast_convert_type(lax.integer_pow(u, self.levels), jnp.uint32) >> 23

    def _square(self, q: jax.Array) -> jax.Array:
        """`q |q|` of a code of the first moment."""
        return q * jnp.abs(q)

    def _compress(self, square: jax.Array, noise: Any) -> jax.Array:
        """A code q, as float32, for which the mean of `q |q|` over all noise is `square`, or +-127.

        The range ends there. With `x = |square|` and c uniform in (0, 1), let q be the integer part
        of `sqrt(x - c (1 - c)) + c`, or 0. For b^2 <= x < (b + 1)^2 it is b + 1 where
        `(1 - c) (2 b + 1) < x - b^2`, else b: the mean of q^2 is x.
        """
        c = jnp.asarray(noise, jnp.int32).astype(jnp.float32) * 2.0**-16 + 2.0**-17
        root = jnp.sqrt(jnp.maximum(jnp.abs(square) + (c * c - c), 0.0))
        size = jnp.minimum(root, 127.0) + c
        return jnp.where(square < 0, -size, size)

    def _power(self, nu: jax.Array, sign: int = 1) -> jax.Array:
        """`2^(+-nu / levels)` of a code."""
        return jnp.exp(nu.astype(jnp.float32) * np.float32(sign * math.log(2) / self.levels))


WIDE = Format()
FORMATS: tuple[Format, ...] = (WIDE, BFloat16(), Logarithmic())


def named(moment_dtype: Any, eps: Any = 1e-8) -> Format:
    """The format that a user's `moment_dtype` stands for.

    Raises:
        ValueError: it is none of the three, or eps is known and out of the format's range.
    """
    name = ""  # An array has a dtype too, but is none.
    if not isinstance(moment_dtype, (jax.Array, np.ndarray, np.generic)):
        with contextlib.suppress(TypeError):
            name = None if moment_dtype is None else jnp.dtype(moment_dtype).name
    fmt = next((fmt for fmt in FORMATS if fmt.name == name), None)
    if fmt is None:
        hint = (
            ". optax.inject_hyperparams calls jnp.uint8 and jnp.bfloat16 as if they were "
            "schedules: write the dtype as a string there"
        )
        raise ValueError(
            "moment_dtype must be None (float32, or float64 for float64 parameters), bfloat16 or "
            f"uint8, got {reprlib.repr(moment_dtype)}"
            + (hint if isinstance(moment_dtype, jax.Array) else "")
        )
    low, high = fmt.eps_range
    if not isinstance(eps, Tracer) and not np.float32(low) <= np.float32(eps) <= np.float32(high):
        raise ValueError(
            f"eps must be from {low:g} to {high:g} with moment_dtype={fmt.name}, or the norms of "
            f"ordinary gradients are out of its range, got {eps}"
        )
    return fmt


def round_to_bfloat16(x: jax.Array, noise: Any) -> jax.Array:
    """Rounds float32 to a neighbour in bfloat16, at random and without bias.

    Args:
        x: any float32.
        noise: uint32, uniform in [0, 2^16).

    Returns:
        bfloat16: x where bfloat16 has it; else one of its two neighbours, the nearer the likelier.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jnp.asarray(noise, jnp.uint32)
    high = (bits >> 16).astype(jnp.uint16)
    rounded = lax.bitcast_convert_type(high, jnp.bfloat16)
    # The noise would carry some NaN over to zero, and the largest numbers to inf.
    is_less = jnp.abs(x) < np.float32(jnp.finfo(jnp.bfloat16).max)
    return straight_through(x, jnp.where(is_less, rounded, x.astype(jnp.bfloat16)))


def _clipped(x: jax.Array) -> jax.Array:
    """`x` to half of the range of float32; what is not finite stays so."""
    return jnp.where(jnp.isfinite(x), lax.clamp(-(2.0**127), x, 2.0**127), x)
