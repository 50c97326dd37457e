"""How the new value of a parameter narrower than float32 is rounded.

`optax.apply_updates` computes `p + u` and rounds to nearest. So the new value p' is chosen first,
and the update is `u = p' - p`: then `p + u` is p' exactly.
"""

import reprlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from adamaxw import _bits
from adamaxw._derivatives import straight_through


class Rounding:
    """How the step of one leaf is applied. This class leaves the rounding to `apply_updates`."""

    # Whether `write` uses noise; the dtype of its residual (int8 is a placeholder of zeros).
    is_noisy: ClassVar[bool] = False
    residual_dtype: ClassVar[Any] = jnp.int8

    def read(self, p: jax.Array, residual: Any, dtype: Any) -> jax.Array:
        """The value of a parameter, in the dtype of the arithmetic."""
        del residual
        return p.astype(dtype)

    def write(
        self, step: jax.Array, value: Any, p: Any, residual: Any, noise: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        """The update that takes a parameter to about `value + step`, and the new residual.

        `value` is what `read` returned, and `noise` uint32, uniform in [0, 2^16). `dtype` is that
        of the gradient. `value` and `p` are None where params are not needed.
        """
        del value, p, noise
        return step.astype(dtype), residual


class Stochastic(Rounding):
    """Rounds to one of the two neighbours at random, without bias."""

    # The update has the gradient's dtype if that is the parameter's: there p' - p is exact unless
    # the step is larger than half of p. In the other 16-bit dtype p' - p is not exact, and may
    # over- or underflow, so that the update is float32.

    is_noisy: ClassVar[bool] = True

    def write(
        self, step: jax.Array, value: Any, p: Any, residual: Any, noise: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        target = (value + step).astype(jnp.float32)
        is_bfloat16 = p.dtype == jnp.bfloat16
        round_ = _bits.round_to_bfloat16 if is_bfloat16 else _bits.round_to_float16
        new = round_(target, noise).astype(value.dtype)
        if jnp.finfo(dtype).bits < 32 and dtype != p.dtype:
            dtype = jnp.float32
        return straight_through(step, (new - value).astype(dtype)), residual


class Exact(Rounding):
    """bfloat16 with a residual of 16 bits: together the bits of a float32 master weight."""

    # The update is float32, whatever the gradient: in bfloat16, `p + u` would miss p' wherever a
    # parameter crosses zero.

    residual_dtype: ClassVar[Any] = jnp.int16

    def read(self, p: jax.Array, residual: Any, dtype: Any) -> jax.Array:
        return straight_through(p.astype(dtype), _bits.join(p, residual).astype(dtype))

    def write(
        self, step: jax.Array, value: Any, p: Any, residual: Any, noise: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        del residual, noise, dtype
        p = p.astype(jnp.float32)
        master = _bits.bits_of((value + step).astype(jnp.float32))
        # Compute `new` from `residual`: XLA for TPU makes two kernels of independent results.
        residual = master.astype(jnp.int16)
        new = _bits.upper(master, residual)
        # If |p'| < 2^-16 |p|, float32 may not hold p' - p exactly. Then `p + u` is another bfloat16
        # than p', and the residual, which belongs to p', is dropped.
        landed = lax.reduce_precision(p + (new - p), exponent_bits=8, mantissa_bits=7)
        residual = jnp.where(landed == new, residual, 0)
        return straight_through(step, _bits.upper(master, residual) - p), residual


NEAREST = Rounding()
_STOCHASTIC, _EXACT = Stochastic(), Exact()
# Of each `param_rounding`, by the dtype of the parameter; wider ones are not rounded.
_NARROW = {
    "stochastic": {"bfloat16": _STOCHASTIC, "float16": _STOCHASTIC},
    "exact": {"bfloat16": _EXACT},
}


def rounding_of(param_rounding: str, dtype: Any) -> Rounding | None:
    """The rounding of parameters of an inexact dtype; None where it is not defined."""
    if param_rounding == "nearest" or jnp.dtype(dtype).itemsize >= 4:
        return NEAREST
    return _NARROW[param_rounding].get(jnp.dtype(dtype).name)


def checked_name(param_rounding: Any) -> str:
    """A user's `param_rounding`; a ValueError if there is no such."""
    if not isinstance(param_rounding, str) or param_rounding not in ("nearest", *_NARROW):
        raise ValueError(
            'param_rounding must be "nearest", "stochastic" or "exact", got '
            f"{reprlib.repr(param_rounding)}"
        )
    return param_rounding
