"""How the moments of a leaf are stored between steps: the only file that knows a format by name.

Two facts make few bits enough for AdaMax; `docs/numerics.md` proves them.

- `u_t = max(b2 u_{t-1}, |g_t| + eps)` decays for all elements at once. Stored as `u = scale w`,
  with the decay taken out of the one `scale`, `w` only ever rises, and rounding it commutes with
  the maximum: what is stored is the exact norm rounded once, however many steps it took.
- `|m_t|` is at most about `u_t`, so the ratio of the two has a fixed range, element by element.
"""

import reprlib
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
    def encode(
        self, m: jax.Array, u: jax.Array, scale: Any, noise: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        if m.dtype == jnp.float64:
            m, u = (_clip_finite(x, 2.0**126) for x in (m, u))
        m, u = m.astype(jnp.float32), u.astype(jnp.float32)
        # A product with the reciprocal: XLA on the CPU computes mu and nu in loops of their own,
        # and stores what is dear and both need, such as a quotient, as a temporary of 4 bytes.
        code = _round_to_int(_clip(self.levels * _log2(u * (1 / scale)), 255))
        ratio = jnp.abs(m / (self._power(code) * (scale * np.float32(self.peak))))
        chance = jnp.asarray(noise, jnp.int32).astype(jnp.float32) * 2.0**-16 + 2.0**-17
        magnitude = self._compress(_clip(ratio, 1), chance)
        signed = jnp.where(m < 0, -magnitude, magnitude)
        q = _round_to_int(jnp.where(ratio < jnp.inf, signed, -128.0))
        return q.astype(jnp.int8), code.astype(jnp.uint8)

    @partial(jax.jit, static_argnums=(0, 4))
    def decode(
        self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        u = self._power(nu) * scale
        m = self._expand(mu.astype(jnp.float32)) * u
        m = jnp.where(mu == -128, jnp.nan, m)
        return m.astype(dtype), u.astype(dtype)

    def _compress(self, ratio: jax.Array, chance: jax.Array) -> jax.Array:
        """A magnitude q, 0 to 127, whose mean over chances in (0, 1) is the ratio in [0, 1]."""
        square = ratio * 127.0**2
        below = jnp.floor(jnp.sqrt(square))
        # The squares to both sides are 2 below + 1 apart.
        is_above = chance * (2 * below + 1) < square - below * below
        return below + jnp.where(is_above, 1.0, 0.0)

    def _expand(self, q: jax.Array) -> jax.Array:
        """The ratio m / u of a code."""
        return q * jnp.abs(q) * np.float32(self.peak / 127**2)

    def _power(self, code: jax.Array) -> jax.Array:
        """`2^(code / levels)`."""
        return _exp2(code.astype(jnp.float32) * np.float32(1 / self.levels))


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


# 2^f for |f| <= 1/2, highest power first: relative error below 3e-6, exact at 0.
_EXP2 = np.array(
    [0.009582853235127453, 0.05590642594305739, 0.2402409861575567, 0.6931241932596307, 1.0],
    np.float32,
)
# log2(z) - (z - 1) for 1 <= z <= 2: error below 2e-5.
_LOG2 = np.array(
    [0.04487358, -0.41656352, 1.63114839, -3.55079254, 4.09171066, -1.80036403], np.float32
)
_MANTISSA = np.int32(2**23 - 1)
_ONE = np.int32(127 << 23)
# Added to a float32 of magnitude below 2^22, it leaves the nearest integer in the low bits.
_MAGIC = np.float32(3 * 2**22)


def _exp2(x: jax.Array) -> jax.Array:
    """`2^x` for float32 -126 <= x < 127.5, to 3e-6; XLA's own takes several times as long."""
    whole = jnp.round(x)
    exponent = lax.bitcast_convert_type(whole + (_MAGIC + 127), jnp.int32) << 23
    return jnp.polyval(_EXP2, x - whole) * lax.bitcast_convert_type(exponent, jnp.float32)


def _log2(x: jax.Array) -> jax.Array:
    """`log2(x)` for positive float32, to 2e-5; about -127 for 0, 128 for inf, a number for NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    mantissa = lax.bitcast_convert_type((bits & _MANTISSA) | _ONE, jnp.float32)
    # Exponent and mantissa read as one number: log2 with straight lines between powers of two.
    linear = (bits - _ONE).astype(jnp.float32) * np.float32(2.0**-23)
    return linear + jnp.polyval(_LOG2, mantissa)


def _clip(x: jax.Array, high: float) -> jax.Array:
    """`x` between 0 and `high`; NaN, which `jnp.clip` keeps at a price, becomes one of the two."""
    x = jnp.where(x > 0, x, 0.0)
    return jnp.where(x < high, x, float(high))


def _round_to_int(x: jax.Array) -> jax.Array:
    """The nearest integer to a float32 of magnitude below 2^22, as int32."""
    return lax.bitcast_convert_type(x + _MAGIC, jnp.int32) - _MAGIC.view(np.int32)
