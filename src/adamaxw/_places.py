"""Where arrays lie: on one device, or sharded over a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from adamaxw._leaves import is_numeric


def is_placed(x: Any) -> bool:
    """Whether `x` is committed to a place, or will be if it is abstract."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding is not None
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed


def places(tree: Any) -> set[Sharding | None]:
    """Where a scalar lies that is everywhere, for each mesh or device of what `is_placed`.

    None stands for what is neither on a mesh nor on a device alone.
    """

    def place(sharding: Sharding) -> Sharding | None:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, SingleDeviceSharding):
            return SingleDeviceSharding(*sharding.device_set)
        return None

    return {place(x.sharding) for x in jax.tree.leaves(tree) if is_placed(x)}


def scalar_sharding(params: Any, is_changed: bool) -> Sharding | None:
    """Where a new scalar must lie so that a compiled step leaves it there: no second compilation.

    None where there is no one such place, or it cannot be known.

    Args:
        params: the parameters.
        is_changed: whether a step computes the scalar anew from leaves of params.

    Raises:
        ValueError: the scalar is changed, and the params are on several meshes.
    """
    found: dict[Any, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        for place in places(x):
            found.setdefault(place, jax.tree_util.keystr(path))
    meshes = [(p.mesh, path) for p, path in found.items() if isinstance(p, NamedSharding)]
    if is_changed and len(meshes) > 1:
        (mesh, path), (other, other_path), *_ = meshes
        raise ValueError(
            f"params{path} is on {mesh}, params{other_path} on {other}, and low-precision moments "
            "have one scale for the tree: give each mesh its own optimizer by optax.partition"
        )
    return next(iter(found)) if len(found) == 1 else None


def lie_together(tree: Any) -> bool:
    """Whether one compiled call can take a tree: numbers, not traced, on one device or mesh."""
    meshes = set()
    for x in jax.tree.leaves(tree):
        is_array = isinstance(x, (jax.Array, np.ndarray, np.generic)) and is_numeric(x)
        if isinstance(x, Tracer) or not (is_array or isinstance(x, (int, float, complex))):
            return False
        if isinstance(x, jax.Array) and x.committed:
            meshes.add(getattr(x.sharding, "mesh", x.sharding))
    return len(meshes) <= 1


def varying_axes(x: Any) -> tuple[str, ...]:
    """Inside `jax.shard_map`, the axes along which JAX knows shards to hold different values."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)  # `vma` until JAX 0.9
    return tuple(sorted(getattr(aval, "vma", ()) if kind is None else kind.varying))


def concrete(sharding: Any) -> Any:
    """`sharding` on the mesh that is set, if its own is abstract; the default place if none is."""
    if not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return sharding
    place: Any = jnp.zeros((), device=NamedSharding(sharding.mesh, PartitionSpec())).sharding
    return NamedSharding(place.mesh, sharding.spec) if hasattr(place, "mesh") else place


def lie_like(x: Any, *others: Any) -> Any:
    """`x` sharded like the first other that is on a mesh, where its axes are explicit.

    Elsewhere JAX sees to that. `x` stays where none is, and where that one is a sum still to be
    done over the mesh. An other may be None.
    """
    goals = (jax.typeof(y).sharding for y in others if y is not None)
    goal = next((goal for goal in goals if not goal.mesh.empty), None)
    if goal is None or getattr(goal.spec, "unreduced", None):
        return x
    differs = jax.typeof(x).sharding.spec != goal.spec
    return jax.sharding.reshard(x, goal) if differs else x
