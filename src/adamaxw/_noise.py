"""Noise for random rounding: a hash of the run's seed, the step, the leaf and the element.

No key is carried from step to step, and the noise is the same on every mesh and when resuming.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

Keys = tuple[jax.Array, jax.Array, jax.Array]


def seed_of(params: Any) -> jax.Array:
    """A uint32 hash of the real leaves: a run that starts from other parameters has other noise."""
    # A sum over elements, and over the shards inside `jax.shard_map`: the same on every mesh.
    arrays = [x for x in jax.tree.leaves(params) if not isinstance(x, jax.ShapeDtypeStruct)]
    sums = [_sum_of_bits(x) for x in arrays if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not any(isinstance(x, Tracer) for x in sums):
        # Through the host, because leaves may be on several devices.
        sums = jax.device_get(sums)
    each = jnp.stack([np.uint32(0), *sums])
    return jnp.sum(_mix(each + _mix(_flat_index(each.shape))), dtype=jnp.uint32)


@jax.jit
def _sum_of_bits(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    # A bijection of each element: any change of a single one changes the sum.
    total = jnp.sum(_mix(bits + _flat_index(x.shape) * np.uint32(0x9E3779B9)), dtype=jnp.uint32)
    manual = tuple(jax.sharding.get_abstract_mesh().manual_axes)
    return lax.psum(total, manual) if manual else total


def next_seed(seed: jax.Array, count: jax.Array) -> jax.Array:
    """The seed of a run whose count restarts at 0 after `count` updates."""
    return _mix(seed + _mix(count.astype(jnp.uint32) + np.uint32(1)))


@jax.jit
def keys(seed: jax.Array, count: jax.Array) -> Keys:
    """Two hashes of a seed (uint32) and a count (int32), and a 0 that XLA cannot fold."""
    key = _mix(count.astype(jnp.uint32) + _mix(seed + np.uint32(0x9E3779B9)))
    return key, _mix(key ^ np.uint32(0x85EBCA6B)), (count < 0).astype(jnp.uint32)


def indices(number: int) -> list[np.ndarray]:
    """The index of each of `number` leaves that train, each in an array of its own: see `draw`."""
    return [np.array([i, number + i], np.uint32) for i in range(number)]


@partial(jax.jit, static_argnames=("shape", "axes"))
def draw(
    keys: Keys, index: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Two independent uint32 arrays, uniform in [0, 2^16): noise for one leaf at one step.

    It is a hash of the keys, the leaf's index and the element's index alone. Inside
    `jax.shard_map`, each shard along `axes` draws its own.
    """
    key, other, zero = keys
    # XLA for CPU and GPU compiles equal kernels once, so the index must not become a constant: read
    # it at a position that XLA does not know. With one array for all leaves, XLA for GPU merges
    # kernels and compiles for minutes. TPUs gain nothing: there XLA folds the minimum, the index.
    pick = partial(lax.dynamic_index_in_dim, keepdims=False)
    leaf = lax.platform_dependent(index, zero, tpu=lambda index, _: jnp.min(index), default=pick)
    key, other = key ^ leaf * np.uint32(0x9E3779B9), other ^ leaf * np.uint32(0xC2B2AE35)
    for axis in axes:
        key, other = (_mix(x ^ lax.axis_index(axis).astype(x.dtype)) for x in (key, other))
    # The second key enters between the rounds: otherwise any two leaves or steps would share one
    # sequence, read from different starting points.
    x = _mix(_flat_index(shape) + key, other)
    return x >> 16, x & np.uint32(0xFFFF)


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of each element, modulo 2^32."""
    return lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _mix(x: jax.Array, key: jax.Array | int = 0) -> jax.Array:
    """A bijective hash of uint32: `triple32` of hash-prospector (Wellons, 2018), less a shift."""
    # Two multiplications instead of three leave correlated bits: see benchmarks/NOTES.md.
    x = x * np.uint32(0xED5AD4BB)
    x = ((x ^ (x >> 11)) + key) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
