"""How the new value of a parameter narrower than float32 is rounded, and the noise for it.

`optax.apply_updates` computes `p + u` and rounds it to the nearest. So the new value p' is chosen
first, and the update is `p' - p`: then p + u is p'.
"""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

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
        master = (value + step).astype(jnp.float32)
        upper, _ = split(master)
        # What p becomes. Where p' is smaller than p by 2^16, p' - p may have no float32.
        landed = lax.reduce_precision(
            p + (upper.astype(jnp.float32) - p), exponent_bits=8, mantissa_bits=7
        )
        master = jnp.where(landed == upper.astype(jnp.float32), master, landed)
        # Division by 1: XLA on the CPU computes the two results in loops of their own, and would
        # repeat in each, and round as it likes, what they share; a division it does once and keeps.
        upper, residual = split(master / jnp.where(jnp.isnan(master), 2.0, 1.0))
        return straight_through(step, upper.astype(jnp.float32) - p), residual


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


def split(master: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into bfloat16 and int16, without loss.

    Returns:
        `(p, residual)`: p is the nearest bfloat16, of two the one further from zero; the bits of
        master are those of p, with 16 zeros behind, plus residual. Of NaN, only that is kept.
    """
    bits = lax.bitcast_convert_type(master, jnp.int32)
    nan = jnp.isnan(master)
    high = jnp.where(nan, np.int32(0x7FC0), (bits + 2**15) >> 16)
    p = lax.bitcast_convert_type(high.astype(jnp.int16), jnp.bfloat16)
    residual = jnp.where(nan, 0, bits - (high << 16))
    return p, residual.astype(jnp.int16)


def join(p: jax.Array, residual: jax.Array) -> jax.Array:
    """The float32 that `split` has taken apart.

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


def leaf_indices(count: jax.Array, number: int) -> list[jax.Array]:
    """0, 1, 2 ... as uint32 scalars that the compiler does not know: `leaf` for `noise`.

    With constants in their place, XLA on the CPU would compile the loops of each leaf anew, instead
    of once for all leaves of a shape.
    """
    one = (count >= 0).astype(jnp.uint32)
    return list(accumulate([one - 1] + [one] * (number - 1), _successor))


@jax.jit
def _successor(index: jax.Array, one: jax.Array) -> jax.Array:
    # XLA computes a quotient that loops use before them, not in each.
    return (index + one) // one


def seed_of(params: Any) -> jax.Array:
    """A hash of the bits of all floating leaves, a uint32 scalar: a new run gets new noise.

    It is a sum over elements, so that it is the same on every mesh; inside `jax.shard_map`, over
    all shards. Abstract leaves count for nothing.
    """
    arrays = [x for x in jax.tree.leaves(params) if not isinstance(x, jax.ShapeDtypeStruct)]
    sums = [_sum_of_bits(x) for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not any(isinstance(x, Tracer) for x in sums):
        # By way of the host: leaves may lie on several devices.
        sums = jax.device_get(sums)
    each = jnp.stack([np.uint32(0), *sums])
    return jnp.sum(_mix(each + _mix(_flat_index(each.shape))), dtype=jnp.uint32)


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # Bijective for each element: no change of a single one goes unseen.
    total = jnp.sum(_mix(bits + _flat_index(x.shape) * np.uint32(0x9E3779B9)), dtype=jnp.uint32)
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return lax.psum(total, manual) if manual else total


def next_seed(seed: jax.Array, count: jax.Array) -> jax.Array:
    """The seed of a run that goes on after `count` updates with a count of 0."""
    return _mix(seed + _mix(count.astype(jnp.uint32) + np.uint32(1)))


@partial(jax.jit, static_argnames="number")
def keys(seed: jax.Array, count: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """What the noise of each leaf starts from: hashes of the run, the step and the leaf.

    Those of all leaves are one computation: compilers get slow where each leaf adds more to it.

    Args:
        seed: uint32 scalar, that of the run.
        count: int32 scalar, the number of updates done.
        number: how many leaves of the tree train.

    Returns:
        Two uint32 vectors, an element for a leaf.
    """
    leaves = lax.iota(jnp.uint32, number) + _mix(seed + np.uint32(0x9E3779B9))
    key = _mix(count.astype(jnp.uint32) + _mix(leaves))
    return key, _mix(key ^ np.uint32(0x85EBCA6B))


@partial(jax.jit, static_argnames=("shape", "axes"))
def noise(
    keys: tuple[jax.Array, jax.Array],
    leaf: jax.typing.ArrayLike,
    shape: tuple[int, ...],
    axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Noise for one leaf at one step: a hash of its keys and the element's index in the leaf.

    It depends on nothing else: not on the mesh.

    Args:
        keys: those of all leaves, as `keys` returns them.
        leaf: index of the leaf among those of the tree that train; it may be traced.
        shape: of the whole leaf.
        axes: inside `jax.shard_map`, those along which each shard draws noise of its own.

    Returns:
        Two uint32 arrays of that shape, independent and uniform in [0, 2^16).
    """
    leaf = jnp.asarray(leaf, jnp.uint32)
    key, other_key = (lax.dynamic_slice(x, (leaf,), (1,)).reshape(()) for x in keys)
    for axis in axes:
        key, other_key = (_mix(x ^ lax.axis_index(axis).astype(x.dtype)) for x in (key, other_key))
    # The second key comes between the rounds: else the noise of any two leaves or steps would be
    # the same sequence, read from another element on.
    x = _mix(_flat_index(shape) ^ key, other_key)
    return x >> 16, x & np.uint32(0xFFFF)


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of each element, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(x: jax.Array, key: jax.Array | int = 0) -> jax.Array:
    """A bijective hash of uint32: Chris Wellons' `triple32`, from his hash-prospector (2018)."""
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB)
    x = ((x ^ (x >> 11)) + key) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
