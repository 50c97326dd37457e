"""Where arrays are: on one device, or sharded over a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from adamaxw._checks import kind_of


def is_placed(x: Any) -> bool:
    """Whether `x` is committed to a device or mesh, or will be if it is abstract."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding is not None
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed


def places_of(tree: Any) -> set[Sharding | None]:
    """A replicated sharding for each mesh or device in use; None for other kinds of sharding."""

    def replicated(sharding: Sharding) -> Sharding | None:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
        is_single = isinstance(sharding, SingleDeviceSharding)
        return SingleDeviceSharding(*sharding.device_set) if is_single else None

    return {replicated(x.sharding) for x in jax.tree.leaves(tree) if is_placed(x)}


def scalar_sharding(params: Any, has_scale: bool) -> Sharding | None:
    """The sharding that a compiled step gives the scalars of the state; None if it is ambiguous."""
    # If init placed them elsewhere, their sharding would change and step 2 would compile again.
    found: dict[Any, str] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        for place in places_of(x):
            found.setdefault(place, f"params{jax.tree_util.keystr(path)}")
    meshes = [f"{x} on {y.mesh}" for y, x in found.items() if isinstance(y, NamedSharding)]
    if has_scale and len(meshes) > 1:
        raise ValueError(
            f"low-precision moments have one scale per tree, but there are {' and '.join(meshes)}: "
            "give each mesh its own optimizer by optax.partition"
        )
    return next(iter(found)) if len(found) == 1 else None


def are_together(tree: Any) -> bool:
    """Whether one jitted call can take the tree: concrete numbers on at most one device or mesh."""
    meshes = set()
    for x in jax.tree.leaves(tree):
        is_array = isinstance(x, (jax.Array, np.ndarray, np.generic)) and kind_of(x) is not None
        if isinstance(x, Tracer) or not (is_array or isinstance(x, (int, float, complex))):
            return False
        if isinstance(x, jax.Array) and x.committed:
            meshes.add(getattr(x.sharding, "mesh", x.sharding))
    return len(meshes) <= 1


def varying_axes(x: Any) -> tuple[str, ...]:
    """Inside `jax.shard_map`, the axes along which JAX knows that shards differ."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)  # `vma` until JAX 0.9
    return tuple(sorted(getattr(aval, "vma", ()) if kind is None else kind.varying))


def concrete(sharding: Any) -> Any:
    """`sharding`, with an abstract mesh replaced by the mesh that is set or the default device."""
    if not isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return sharding
    place: Any = jnp.zeros((), device=NamedSharding(sharding.mesh, PartitionSpec())).sharding
    return NamedSharding(place.mesh, sharding.spec) if hasattr(place, "mesh") else place


def reshard_like(x: Any, *others: Any) -> Any:
    """`x` sharded like the first of the others that is on a mesh with explicit axes.

    Returns `x` unchanged if there is none, or if that one is `unreduced`: a sum still pending.
    """
    goals = (jax.typeof(y).sharding for y in others if y is not None)
    goal = next((goal for goal in goals if not goal.mesh.empty), None)
    if goal is None or getattr(goal.spec, "unreduced", None):
        return x
    differs = jax.typeof(x).sharding.spec != goal.spec
    return jax.sharding.reshard(x, goal) if differs else x
