"""How the moments of a leaf are stored between steps.

Two facts make few bits enough for AdaMax; `docs/numerics.md` proves them.

- `u_t = max(b2 u_{t-1}, |g_t| + eps)` decays for all elements at once. Stored as `u = scale w`,
  with the decay in `scale`, `w` only rises or shifts exactly along its grid, and rounding commutes
  with the maximum: the stored norm is the exact one rounded once, however many steps were taken.
- `|m_t|` is at most about `u_t`, so their ratio has the same fixed range for every element.
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

from adamaxw import _bits, _cpu
from adamaxw._derivatives import straight_through, without_derivatives
from adamaxw._rule import Constants, cast, next_moments

Pair = tuple[jax.Array, jax.Array]


def arithmetic(dtype: Any) -> Any:
    """The real dtype in which gradients or parameters of an inexact dtype are computed."""
    return jnp.float64 if jnp.finfo(dtype).bits == 64 else jnp.float32


@dataclass(frozen=True)
class Format:
    """A way to store moments, element by element; this class stores them as they are.

    A fresh state holds zeros of `dtypes` and the scale `rescale(eps, eps)`.
    """

    # The `moment_dtype` that selects it.
    name: ClassVar[str | None] = None
    # Values of eps for which the norms of ordinary gradients are in range.
    eps_range: ClassVar[tuple[float, float]] = (0.0, np.inf)
    # Whether norms are in units of a scale, and whether `encode` rounds at random.
    has_scale: ClassVar[bool] = False
    is_noisy: ClassVar[bool] = False
    # In every format, a stored norm of eps is at most this times eps (uint8: half a level more).
    floor_tolerance: ClassVar[float] = 2 ** (1 / 12) * (1 + 1e-4)

    def dtypes(self, dtype: Any) -> Any:
        """Dtypes of `mu` and `nu` for parameters of an inexact dtype; None if not supported."""
        norm = arithmetic(dtype)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return (jnp.complex128 if norm == jnp.float64 else jnp.complex64), norm
        return norm, norm

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """Moves `scale` by whole levels until norms from `eps` up are in range; 0 restarts it.

        Both are float32 scalars. None in a format without a scale.
        """
        del scale, eps

    def encode(self, m: jax.Array, u: jax.Array, scale: Any, noise: Any) -> Pair:
        """Stores a first moment and a norm; `noise` is uint32, uniform in [0, 2^16)."""
        del scale, noise
        return m, u

    def decode(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> Pair:
        """The first moment and the norm, in `dtype` (this class: in their own dtypes)."""
        del scale, dtype
        return mu, nu

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        """The first moment over the norm."""
        m, u = self.decode(mu, nu, scale, dtype)
        return m / u.astype(m.dtype)

    def saturated(self, mu: jax.Array, nu: jax.Array) -> dict[str, jax.Array]:
        """Which norms are at the upper bound of the format, as 'saturated', if it has one."""
        del mu, nu
        return {}

    def step(
        self, g: jax.Array, stored: Pair, scales: tuple[Any, Any], noise: Any, constants: Constants
    ) -> Pair:
        """`mu` and `nu` after a gradient: decode, `_rule.next_moments`, encode.

        `scales` are the one of `stored`, the previous `mu` and `nu`, and the one to encode with.
        """
        m, u = self.decode(*stored, scales[0], arithmetic(g.dtype))
        b1, b2, eps = constants
        constants = Constants(cast(b1, m.dtype), cast(b2, u.dtype), cast(eps, u.dtype))
        m, u = next_moments(g.astype(m.dtype), m, u, constants)
        return self.encode(m, u, scales[1], noise)


class _Narrow(Format):
    stored: ClassVar[tuple[Any, Any]]
    has_scale: ClassVar[bool] = True
    is_noisy: ClassVar[bool] = True

    def dtypes(self, dtype: Any) -> tuple[Any, Any] | None:
        return self.stored if jnp.issubdtype(dtype, jnp.floating) else None


@dataclass(frozen=True)
class BFloat16(_Narrow):
    """4 bytes per parameter: `m` and `w` in bfloat16, where `u = scale w` and 1 <= scale < 2."""

    # When the scale falls below 1, every w halves, which is exact. `m` is rounded at random:
    # rounded to nearest, it would stop decaying once `1 - b1` is below 1/512.

    name: ClassVar[str | None] = "bfloat16"
    stored: ClassVar[tuple[Any, Any]] = (jnp.bfloat16, jnp.bfloat16)

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        del eps
        fixed = lax.stop_gradient(jnp.where(scale == 0, 1.0, scale))
        fraction, _ = jnp.frexp(fixed)  # in [1/2, 1)
        # Multiply by a power of two, so that derivatives with respect to the scale are right.
        moved = scale * (2 * fraction / fixed)
        return jnp.where(scale == 0, 1.0, moved)

    @partial(jax.jit, static_argnums=0)
    def encode(self, m: jax.Array, u: jax.Array, scale: Any, noise: Any) -> Pair:
        # Leave headroom: numbers near the largest float32 would round up to inf in bfloat16.
        m, u = (_bits.clip_to_half_range(x).astype(jnp.float32) for x in (m, u))
        w = (u * (1 / scale)).astype(jnp.bfloat16)
        # Gives `scale w` the derivative of u, with respect to the scale as well.
        exact = (u - lax.stop_gradient(w.astype(jnp.float32)) * scale) / lax.stop_gradient(scale)
        mu = straight_through(m, _bits.round_to_bfloat16(m, noise))
        return mu, straight_through(exact, w)

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> Pair:
        """See `Format`. The norm is NaN if the scale is neither 0 nor in [1, 2): it is corrupt."""
        is_scale = ((scale >= 1) & (scale < 2)) | (scale == 0)
        scale = jnp.where(is_scale, scale, jnp.nan)
        return mu.astype(dtype), (nu.astype(jnp.float32) * scale).astype(dtype)


@dataclass(frozen=True)
class Logarithmic(_Narrow):
    """2 bytes per parameter: `nu` on a logarithmic grid, `mu` as the ratio of the two moments.

    - `nu` is a uint8 code c: `u = scale 2^(c / levels)`, with the scale within half a level of eps.
    - `mu` is an int8 code q: `m = u peak sign(q) (q / 127)^2`, rounded at random and without bias
      to one of two neighbours, and clipped to `peak u`. -128 marks what is not finite.

    Attributes:
        levels: levels of the norm per octave.
        peak: the largest ratio |m| / u. The defaults reach 1.01, and rounding u adds 6%.
    """

    levels: int = 6
    peak: float = 1.25
    name: ClassVar[str | None] = "uint8"
    stored: ClassVar[tuple[Any, Any]] = (jnp.int8, jnp.uint8)
    # With eps=1e-10 norms reach only 620; above 1e25 float32 could not hold the largest ones.
    eps_range: ClassVar[tuple[float, float]] = (1e-10, 1e25)

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        levels = jnp.round(self.levels * jnp.log2(eps / scale))
        moved = scale * jnp.exp2(levels / self.levels)
        return jnp.where((scale > 0) & (moved > 0) & (moved < jnp.inf), moved, eps)

    @partial(jax.jit, static_argnums=0)
    def encode(self, m: jax.Array, u: jax.Array, scale: Any, noise: Any) -> Pair:
        if m.dtype == jnp.float64:
            m, u = _bits.clip_to_half_range(m), _bits.clip_to_half_range(u)
        m, u = m.astype(jnp.float32), u.astype(jnp.float32)
        # Compute `mu` from the stored `nu`: XLA for TPU makes two kernels of independent results.
        unit = _bits.level_unit(scale, self.levels)
        nu = _bits.nearest_level(u * unit, self.levels).astype(jnp.uint8)
        square = m * (np.float32(127**2 / self.peak) / scale) * self._power(nu, -1)
        mu = jnp.where(jnp.isfinite(m), _bits.signed_root(square, noise), -128.0)
        return without_derivatives((mu.astype(jnp.int8), nu), (m, u, scale))

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> Pair:
        scale = jnp.where(scale < 0, jnp.nan, scale)
        u = (self._power(nu) * scale).astype(dtype)
        return self.ratio(mu, nu, scale, dtype) * u, u

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        del nu, scale
        q = mu.astype(jnp.float32)
        square = jnp.where(q == -128, jnp.nan, q * jnp.abs(q))
        return (square * np.float32(self.peak / 127**2)).astype(dtype)

    def saturated(self, mu: jax.Array, nu: jax.Array) -> dict[str, jax.Array]:
        """See `Format`. Elements that are not finite have the largest norm, too."""
        return {"saturated": (nu == 255) & (mu != -128)}

    def step(self, *arguments: Any) -> Pair:
        """See `Format`. Finite gradients are clipped to the largest norm that can be stored."""
        g, stored, scales, noise, constants = lax.stop_gradient(arguments)
        g = g.astype(arithmetic(g.dtype))
        size, largest = jnp.abs(g), scales[1] * np.float32(2 ** (255 / self.levels))
        bounded = jnp.minimum(size, largest.astype(g.dtype))  # XLA for TPU lays out `clip` worse
        g = jnp.where(size < jnp.inf, jnp.where(g < 0, -bounded, bounded), g)
        cpu, inputs = partial(_cpu.logarithmic_step, self), (g, stored, scales, noise, constants)
        codes = lax.platform_dependent(*inputs, cpu=cpu, default=super().step)
        return without_derivatives(codes, arguments)

    def _power(self, nu: jax.Array, sign: int = 1) -> jax.Array:
        """`2^(+-nu / levels)` of a code."""
        return jnp.exp(nu.astype(jnp.float32) * np.float32(sign * math.log(2) / self.levels))


WIDE = Format()
FORMATS: tuple[Format, ...] = (WIDE, BFloat16(), Logarithmic())


def of_moment_dtype(moment_dtype: Any, eps: Any = 1e-8) -> Format:
    """The format that a user's `moment_dtype` selects, for an eps in its range; or a ValueError."""
    name = ""
    if not isinstance(moment_dtype, (jax.Array, np.ndarray, np.generic)):
        with contextlib.suppress(TypeError):
            name = None if moment_dtype is None else jnp.dtype(moment_dtype).name
    fmt = next((fmt for fmt in FORMATS if fmt.name == name), None)
    if fmt is None:
        raise ValueError(
            "moment_dtype must be None (float32, or float64 for float64 parameters), bfloat16 or "
            f"uint8, got {reprlib.repr(moment_dtype)}. Within optax.inject_hyperparams, which "
            "calls jnp.uint8 as a schedule, pass a string"
        )
    low, high = fmt.eps_range
    if not isinstance(eps, Tracer) and not np.float32(low) <= np.float32(eps) <= np.float32(high):
        raise ValueError(
            f"eps must be from {low:g} to {high:g} with moment_dtype={fmt.name}, whose range of "
            f"norms depends on it, got {eps}"
        )
    return fmt
