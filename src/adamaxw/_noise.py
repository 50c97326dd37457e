"""The noise that values are rounded with: a hash of the run, the step, the leaf and the element.

No key is kept from step to step, and the noise is the same on every mesh and after a resumption.
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


@jax.jit
def keys(seed: jax.Array, count: jax.Array) -> Keys:
    """Of a run's seed and a count, uint32 and int32: two hashes, and a 0 that XLA does not know."""
    key = _mix(count.astype(jnp.uint32) + _mix(seed + np.uint32(0x9E3779B9)))
    return key, _mix(key ^ np.uint32(0x85EBCA6B)), (count < 0).astype(jnp.uint32)


def indices(number: int) -> list[np.ndarray]:
    """That of each leaf among those that train, in an array of its own: see `draw`."""
    return [np.array([i, number + i], np.uint32) for i in range(number)]


@partial(jax.jit, static_argnames=("shape", "axes"))
def draw(
    keys: Keys, index: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Noise for one leaf at one step: a hash of keys, the leaf's index and that of the element.

    It depends on nothing else: not on the mesh.

    Args:
        keys: those of the step.
        index: of the leaf, the first of two.
        shape: of the whole leaf.
        axes: inside `jax.shard_map`, those along which each shard draws noise of its own.

    Returns:
        Two uint32 arrays of that shape, independent and uniform in [0, 2^16).
    """
    key, other, zero = keys
    # Where equal kernels are compiled once, leaves must not differ by a constant: so the place in
    # the array is not one. With an array for all, XLA for GPU would merge leaves, in minutes.
    # The first is the smaller, which XLA for TPU folds into a constant.
    pick = partial(lax.dynamic_index_in_dim, keepdims=False)
    leaf = lax.platform_dependent(index, zero, tpu=lambda index, _: jnp.min(index), default=pick)
    key, other = key ^ leaf * np.uint32(0x9E3779B9), other ^ leaf * np.uint32(0xC2B2AE35)
    for axis in axes:
        key, other = (_mix(x ^ lax.axis_index(axis).astype(x.dtype)) for x in (key, other))
    # The second key comes between the rounds: else the noise of any two leaves or steps would be
    # the same sequence, read from another element on.
    x = _mix(_flat_index(shape) + key, other)
    return x >> 16, x & np.uint32(0xFFFF)


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of each element, modulo 2^32."""
    return lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)


def _mix(x: jax.Array, key: jax.Array | int = 0) -> jax.Array:
    """A bijective hash of uint32: `triple32` of hash-prospector (Wellons, 2018), less a shift."""
    # Without another step of it, the tests of the noise fail.
    x = x * np.uint32(0xED5AD4BB)
    x = ((x ^ (x >> 11)) + key) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
