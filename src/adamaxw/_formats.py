"""How the moments of a leaf are stored between steps: the only file that knows a format by name.

Two facts make few bits enough for AdaMax; `docs/numerics.md` proves them.

- `u_t = max(b2 u_{t-1}, |g_t| + eps)` decays for all elements at once. Stored as `u = scale w`,
  with the decay taken out of the one `scale`, `w` only ever rises, and rounding it commutes with
  the maximum: what is stored is the exact norm rounded once, however many steps it took.
- `|m_t|` is at most about `u_t`, so the ratio of the two has a fixed range, element by element.
"""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

# Noise for `encode` that rounds to the nearest: half of the range of 16 bits.
TO_NEAREST = np.uint32(2**15)


class Format(Protocol):
    """A way to store moments. All methods but `rescale` work on one leaf, element by element.

    `encode` and `decode` are best compiled functions of their own: then they are traced once for
    all leaves of a shape.

    Before the first step a state holds zeros of `dtypes` and the scale `rescale(eps, eps)`.

    Attributes:
        name: the `moment_dtype` that stands for it.
        smallest_eps: below it, norms of ordinary gradients would be out of range.
        has_scale: whether there is a scale.
        is_noisy: whether `encode` rounds at random.
    """

    name: ClassVar[str | None]
    smallest_eps: ClassVar[float]
    has_scale: ClassVar[bool]
    is_noisy: ClassVar[bool]

    def dtypes(self, dtype: Any) -> tuple[Any, Any] | None:
        """Dtypes of `mu` and `nu` for parameters of an inexact dtype; None if it has none."""
        ...

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """`scale` moved by whole steps of the grid to where norms of at least `eps` are in range.

        Args:
            scale: float32 scalar, not negative; 0 or what is not finite starts anew.
            eps: float32 scalar.

        Returns:
            The scale to encode with, a float32 scalar; None in a format that has none.
        """
        ...

    def clip(self, g: jax.Array, scale: jax.Array | None) -> jax.Array:
        """A gradient no larger than the norms that can be stored with a scale; not if infinite."""
        ...

    def encode(
        self, m: jax.Array, u: jax.Array, scale: jax.Array | None, noise: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Stores a first moment and a norm; `noise` is uint32, uniform in [0, 2^16)."""
        ...

    def decode(
        self, mu: jax.Array, nu: jax.Array, scale: jax.Array | None, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The first moment and the norm that `encode` has stored with this scale.

        In `dtype`, float32 or float64, unless they are stored in the dtype of the arithmetic.
        """
        ...

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
        """The first of the two over the second."""
        ...


@dataclass(frozen=True)
class Wide:
    """As they are: float32, float64 for 64-bit parameters, the first moment complex for complex."""

    name: ClassVar[str | None] = None
    smallest_eps: ClassVar[float] = 0.0
    has_scale: ClassVar[bool] = False
    is_noisy: ClassVar[bool] = False

    def dtypes(self, dtype: Any) -> tuple[Any, Any]:
        """See `Format`."""
        wide = jnp.finfo(dtype).bits == 64
        norm = jnp.float64 if wide else jnp.float32
        if jnp.issubdtype(dtype, jnp.complexfloating):
            return (jnp.complex128 if wide else jnp.complex64), norm
        return norm, norm

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """See `Format`."""
        del scale, eps

    def clip(self, g: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Format`."""
        del scale
        return g

    def encode(
        self, m: jax.Array, u: jax.Array, scale: jax.Array | None, noise: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        del scale, noise
        return m, u

    def decode(
        self, mu: jax.Array, nu: jax.Array, scale: jax.Array | None, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        del scale, dtype
        return mu, nu

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
        """See `Format`."""
        del scale, dtype
        return mu / nu.astype(mu.dtype)


@dataclass(frozen=True)
class BFloat16:
    """4 bytes a parameter: bfloat16 `m`, and `w` in bfloat16 with `u = scale w`, 1/2 < scale <= 1.

    When the scale crosses 1/2, every w halves, which is exact. `m` is rounded at random: to the
    nearest, it would stay where it is once `1 - b1` is below 1/512.
    """

    name: ClassVar[str | None] = "bfloat16"
    smallest_eps: ClassVar[float] = 0.0
    has_scale: ClassVar[bool] = True
    is_noisy: ClassVar[bool] = True

    def dtypes(self, dtype: Any) -> tuple[Any, Any] | None:
        """See `Format`."""
        is_real = jnp.issubdtype(dtype, jnp.floating)
        return (jnp.bfloat16, jnp.bfloat16) if is_real else None

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """See `Format`."""
        del eps
        fraction, _ = jnp.frexp(scale)  # in [1/2, 1)
        fraction = jnp.where(fraction == 0.5, 1.0, fraction)
        return jnp.where((fraction > 0) & jnp.isfinite(scale), fraction, 1.0)

    def clip(self, g: jax.Array, scale: jax.Array | None) -> jax.Array:
        """See `Format`: norms up to 2^126, whatever the scale."""
        del scale
        return g

    @partial(jax.jit, static_argnums=0)
    def encode(
        self, m: jax.Array, u: jax.Array, scale: Any, noise: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        # A quarter of the largest number: 1 / scale may double it, and rounding adds to that.
        m, u = (_clip_finite(x, 2.0**126).astype(jnp.float32) for x in (m, u))
        return round_to_bfloat16(m, noise), (u * (1 / scale)).astype(jnp.bfloat16)

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(
        self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        return mu.astype(dtype), (nu.astype(jnp.float32) * scale).astype(dtype)

    @partial(jax.jit, static_argnums=(0, 4))
    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        """See `Format`."""
        m, u = self.decode(mu, nu, scale, dtype)
        return m / u


@dataclass(frozen=True)
class Logarithmic:
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
    smallest_eps: ClassVar[float] = 1e-10  # norms up to 620
    has_scale: ClassVar[bool] = True
    is_noisy: ClassVar[bool] = True

    def dtypes(self, dtype: Any) -> tuple[Any, Any] | None:
        """See `Format`."""
        return (jnp.int8, jnp.uint8) if jnp.issubdtype(dtype, jnp.floating) else None

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """See `Format`."""
        steps = jnp.round(self.levels * jnp.log2(eps / scale))
        moved = scale * jnp.exp2(steps / self.levels)
        return jnp.where((scale > 0) & (moved > 0) & (moved < jnp.inf), moved, eps)

    @partial(jax.jit, static_argnums=0)
    def clip(self, g: jax.Array, scale: Any) -> jax.Array:
        """See `Format`."""
        largest = (scale * np.float32(2 ** (255 / self.levels))).astype(g.dtype)
        size = jnp.abs(g)
        return jnp.where((size > largest) & (size < jnp.inf), jnp.copysign(largest, g), g)

    @partial(jax.jit, static_argnums=0)
    def encode(
        self, m: jax.Array, u: jax.Array, scale: Any, noise: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        if m.dtype == jnp.float64:
            m, u = (_clip_finite(x, 2.0**126) for x in (m, u))
        m, u = m.astype(jnp.float32), u.astype(jnp.float32)
        # The last operations on both are selections between codes: see `benchmarks/NOTES.md`.
        level = _log2(u, self.levels, -self.levels * jnp.log2(scale))
        code = _round_to_int(jnp.where(level > 0, level, 0.0)).astype(jnp.uint8)
        nu = jnp.where(level < 255, code, np.uint8(255))
        square = jnp.abs(m) * self._power(nu, -1) * (np.float32(127**2 / self.peak) / scale)
        chance = jnp.asarray(noise, jnp.int32).astype(jnp.float32) * 2.0**-16 + 2.0**-17
        magnitude = self._compress(jnp.where(square < 127.0**2, square, 127.0**2), chance)
        code = _round_to_int(_with_sign_of(m, magnitude)).astype(jnp.int8)
        return jnp.where(jnp.abs(m) < jnp.inf, code, np.int8(-128)), nu

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(
        self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        power = self._power(nu)
        m = self._expand(mu) * (np.float32(self.peak / 127**2) * scale) * power
        return m.astype(dtype), (power * scale).astype(dtype)

    @partial(jax.jit, static_argnums=(0, 4))
    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        """See `Format`."""
        del nu, scale
        return (self._expand(mu) * np.float32(self.peak / 127**2)).astype(dtype)

    def _compress(self, square: jax.Array, chance: jax.Array) -> jax.Array:
        """An integer whose square has the mean `square` >= 0, over chances uniform in (0, 1)."""
        below = jnp.floor(jnp.sqrt(square))
        # The squares to both sides are 2 below + 1 apart.
        is_above = chance * (2 * below + 1) < square - below * below
        return below + jnp.where(is_above, 1.0, 0.0)

    def _expand(self, mu: jax.Array) -> jax.Array:
        """`q |q|` of a code of the first moment; NaN for -128."""
        q = mu.astype(jnp.float32)
        return jnp.where(mu == -128, jnp.nan, q * jnp.abs(q))

    def _power(self, code: jax.Array, sign: int = 1) -> jax.Array:
        """`2^(code / levels)`, or its reciprocal, to 7e-6."""
        # As the bits of a float32: its exponent, and 2^fraction with straight lines between.
        exact = 2**23 / self.levels
        step = round(exact)
        # An integer, so that it is a little off; here half of what the last code lacks.
        middle = round((exact - step) * 255 / 2)
        at_zero = np.int32(sign * middle) + _ONE
        return _exp2_of_linear(code.astype(jnp.int32) * np.int32(sign * step) + at_zero)


WIDE = Wide()
FORMATS: tuple[Format, ...] = (WIDE, BFloat16(), Logarithmic())


def named(moment_dtype: Any) -> Format:
    """The format that a user's `moment_dtype` stands for.

    Raises:
        ValueError: it is none of the three.
    """
    is_value = isinstance(moment_dtype, (jax.Array, np.ndarray, np.generic))
    if not is_value:
        try:
            name = None if moment_dtype is None else jnp.dtype(moment_dtype).name
        except TypeError:
            name = ""
        for candidate in FORMATS:
            if candidate.name == name:
                return candidate
    hint = ""
    if isinstance(moment_dtype, jax.Array):
        hint = (
            ". optax.inject_hyperparams calls jnp.uint8 and jnp.bfloat16 as if they were "
            "schedules: write the dtype as a string there"
        )
    raise ValueError(
        "moment_dtype must be None (float32, or float64 for float64 parameters), bfloat16 or "
        f"uint8, got {reprlib.repr(moment_dtype)}{hint}"
    )


def check_eps(fmt: Format, eps: Any) -> None:
    """Refuses an eps that is too small for a format; a traced one passes.

    Raises:
        ValueError: naming the bound.
    """
    if not isinstance(eps, Tracer) and np.float32(eps) < np.float32(fmt.smallest_eps):
        raise ValueError(
            f"eps must be at least {fmt.smallest_eps} with moment_dtype={fmt.name}, or the norms "
            f"of ordinary gradients are out of its range, got {eps}"
        )


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
    return jnp.where(jnp.isfinite(x) & jnp.isfinite(rounded), rounded, x.astype(jnp.bfloat16))


def _clip_finite(x: jax.Array, limit: float) -> jax.Array:
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)


# 2^(z - 1) for 1 <= z <= 2, highest power first: relative error below 3e-6.
_EXP2 = np.array([0.01353417, -0.00212521, 0.16661337, 0.31201604, 0.50996422], np.float32)
# log2(z) - (z - 1) for 1 <= z <= 2: error below 2e-5.
_LOG2 = np.array(
    [0.04487358, -0.41656352, 1.63114839, -3.55079254, 4.09171066, -1.80036403], np.float32
)
_MANTISSA = np.int32(2**23 - 1)
_EXPONENT = np.int32(-(2**23))
_ONE = np.int32(127 << 23)
# Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits.
_MAGIC = np.float32(3 * 2**22)


def _exp2_of_linear(bits: jax.Array) -> jax.Array:
    """`2^(e + z - 1)` of a float32 `2^e z`, 1 <= z < 2, given as its bits."""
    octave = lax.bitcast_convert_type(bits & _EXPONENT, jnp.float32)
    return _polynomial(_EXP2, _mantissa(bits)) * octave


def _log2(x: jax.Array, times: int, plus: Any = 0.0) -> jax.Array:
    """`times log2(x) + plus` for positive float32; the log to 2e-5, for 0 -127, inf 128."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # Exponent and mantissa read as one number: log2 with straight lines between powers of two.
    linear = (bits - _ONE).astype(jnp.float32) * np.float32(times * 2.0**-23)
    *others, last = times * _LOG2
    return linear + _polynomial([*others, last + plus], _mantissa(bits))


def _mantissa(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((bits & _MANTISSA) | _ONE, jnp.float32)


def _polynomial(coefficients: Iterable[Any], x: jax.Array) -> jax.Array:
    """Its value, highest power first; `jnp.polyval` begins with a product with zero."""
    value, *others = coefficients
    for coefficient in others:
        value = value * x + coefficient
    return jnp.asarray(value)


def _with_sign_of(m: jax.Array, magnitude: jax.Array) -> jax.Array:
    bits, sign = (lax.bitcast_convert_type(x, jnp.int32) for x in (magnitude, m))
    return lax.bitcast_convert_type(bits | (sign & np.int32(-(2**31))), jnp.float32)


def _round_to_int(x: jax.Array) -> jax.Array:
    """The nearest integer to a float32 of magnitude below 2^22, as int32."""
    return lax.bitcast_convert_type(x + _MAGIC, jnp.int32) - _MAGIC.view(np.int32)
