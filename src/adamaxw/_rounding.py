"""How the new value of a parameter narrower than float32 is rounded.

`optax.apply_updates` computes `p + u` and rounds it to the nearest. So the new value p' is chosen
first, and the update is `p' - p`: then p + u is p'.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamaxw._derivatives import straight_through
from adamaxw._formats import round_to_bfloat16


@dataclass(frozen=True)
class Rounding:
    """What becomes of one leaf's step; here the step itself, which whoever applies it rounds.

    Attributes:
        is_noisy: whether `write` uses noise.
        residual_dtype: dtype of what `write` keeps beside each element; int8 stands for nothing.
    """

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

        Args:
            step: what the rule wants to add.
            value: what `read` gave; None where params are not needed.
            p: the parameter as it is stored; likewise.
            residual: the one before; None where the tree has none.
            noise: uint32, uniform in [0, 2^16).
            dtype: dtype of the gradient.
        """
        del value, p, noise
        return step.astype(dtype), residual


NEAREST = Rounding()


@dataclass(frozen=True)
class Stochastic(Rounding):
    """One of the two neighbours at random, without bias. The update has the gradient's dtype.

    In the dtype of the parameter, p' - p is exact unless the step is larger than half of p. In the
    other dtype of 16 bits it is not, and may over- or underflow: then the update is float32.
    """

    is_noisy: ClassVar[bool] = True

    def write(
        self, step: jax.Array, value: Any, p: Any, residual: Any, noise: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        target = (value + step).astype(jnp.float32)
        round_ = round_to_bfloat16 if p.dtype == jnp.bfloat16 else round_to_float16
        new = round_(target, noise).astype(value.dtype)
        if jnp.finfo(dtype).bits < 32 and dtype != p.dtype:
            dtype = jnp.float32
        return straight_through(step, (new - value).astype(dtype)), residual


@dataclass(frozen=True)
class Exact(Rounding):
    """bfloat16 with a residual of 16 bits: together the bits of a float32 master weight.

    The update is float32, whatever the gradient: in bfloat16, p + u would miss p' wherever a
    parameter crosses zero.
    """

    residual_dtype: ClassVar[Any] = jnp.int16

    def read(self, p: jax.Array, residual: Any, dtype: Any) -> jax.Array:
        return straight_through(p.astype(dtype), join(p, residual).astype(dtype))

    def write(
        self, step: jax.Array, value: Any, p: Any, residual: Any, noise: Any, dtype: Any
    ) -> tuple[jax.Array, Any]:
        del residual, noise, dtype
        p = p.astype(jnp.float32)
        master = bits_of((value + step).astype(jnp.float32))
        # One part from the other: else XLA for TPU makes two kernels.
        residual = master.astype(jnp.int16)
        new = upper(master, residual)
        # Where p' is smaller than p by 2^16, p' - p may have no float32: then p lands elsewhere,
        # and the residual, of another number, would be wrong beside it.
        landed = lax.reduce_precision(p + (new - p), exponent_bits=8, mantissa_bits=7)
        residual = jnp.where(landed == new, residual, 0)
        return straight_through(step, upper(master, residual) - p), residual


@dataclass(frozen=True, eq=False)
class ParamRounding:
    """What a user's `param_rounding` stands for.

    Attributes:
        name: the argument.
        narrow: the rounding of each dtype narrower than float32, by its name.
        others: that of the other narrow dtypes; None refuses them.
    """

    name: str
    narrow: Mapping[str, Rounding]
    others: Rounding | None = None

    @property
    def needs_params(self) -> bool:
        """Whether an update depends on the parameter."""
        return any(rounding != NEAREST for rounding in self.narrow.values())

    @property
    def is_noisy(self) -> bool:
        """Whether some parameters are rounded at random."""
        return any(rounding.is_noisy for rounding in self.narrow.values())

    def of(self, dtype: Any) -> Rounding | None:
        """The rounding of parameters of an inexact dtype; None where it is not defined.

        Nothing is rounded from float32 on.
        """
        if jnp.dtype(dtype).itemsize >= 4:
            return NEAREST
        return self.narrow.get(jnp.dtype(dtype).name, self.others)


_NAMED = {
    rounding.name: rounding
    for rounding in (
        ParamRounding("nearest", {}, NEAREST),
        ParamRounding("stochastic", {"bfloat16": Stochastic(), "float16": Stochastic()}),
        ParamRounding("exact", {"bfloat16": Exact()}),
    )
}


def named(param_rounding: Any) -> ParamRounding:
    """The rounding that a user's `param_rounding` stands for.

    Raises:
        ValueError: it is none of the three.
    """
    if not isinstance(param_rounding, str) or param_rounding not in _NAMED:
        raise ValueError(
            'param_rounding must be "nearest", "stochastic" or "exact", got '
            f"{reprlib.repr(param_rounding)}"
        )
    return _NAMED[param_rounding]


def bits_of(master: jax.Array) -> jax.Array:
    """Those of a float32, as int32; one NaN stands for all. The low half is the residual."""
    master = _once(jnp.where(jnp.isnan(master), jnp.nan, master))
    return lax.bitcast_convert_type(master, jnp.int32)


def upper(bits: jax.Array, residual: jax.Array) -> jax.Array:
    """The rest of the bits, as float32: the nearest bfloat16, of two the one further from zero."""
    return lax.bitcast_convert_type(bits - residual.astype(jnp.int32), jnp.float32)


def _once(x: jax.Array) -> jax.Array:
    """`x`, which no two loops compute: each might fuse products and sums, and round, as it likes.

    A division by 1 is not repeated by XLA for CPU and GPU. XLA for TPU has one loop without.
    """
    one = jnp.where(jnp.isnan(x), 2.0, 1.0)
    return lax.platform_dependent(x, one, tpu=lambda x, _: x, default=jnp.divide)


def join(p: jax.Array, residual: jax.Array) -> jax.Array:
    """The float32 that `Exact.write` has taken apart.

    A parameter that was changed since keeps its new value, to within half a step of bfloat16.
    """
    high = lax.bitcast_convert_type(p, jnp.int16).astype(jnp.int32) << 16
    residual = residual.astype(jnp.int32)
    # Below zero there is nothing: the bits of -0 minus 1 are a NaN.
    is_zero = (high & np.int32(2**31 - 1)) == 0
    residual = jnp.where(is_zero, jnp.maximum(residual, 0), residual)
    return lax.bitcast_convert_type(high + residual, jnp.float32)


def round_to_float16(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Rounds float32 to a neighbour in float16; see `round_to_bfloat16`."""
    # Above 2^-14 float16 lacks the last 13 bits of float32.
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
    return straight_through(x, jnp.where(is_finite, rounded, x.astype(jnp.float16)))
