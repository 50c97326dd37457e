"""Shardings for the state of an optimizer, known before any of it is allocated.

The step is elementwise and runs where the state lies. Spreading the state over the data axis, which
gathers the new parameters, is stage 1 of ZeRO (Rajbhandari et al., "ZeRO: Memory Optimizations
Toward Training Trillion Parameter Models", SC 2020, https://arxiv.org/abs/1910.02054).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.tree_util import keystr, tree_leaves_with_path

from adamaxw import _checks, _leaves, _paths, _places
from adamaxw._state import is_state
from adamaxw._table import Table


def of_state(
    opt: optax.GradientTransformation,
    params: optax.Params,
    *,
    data_axis: str | Sequence[str] = (),
    memory_kind: str | None = None,
) -> Any:
    """Shardings for the state of an optimizer, derived from those of the parameters.

    Args:
        opt: `adamaxw`, `adamax`, or a chain or wrapper around them.
        params: the parameters: arrays, or `jax.ShapeDtypeStruct` with shardings, all on one mesh,
            concrete or abstract, with automatic or explicit axes, or all on one device. Numbers and
            uncommitted arrays count as replicated.
        data_axis: one or several axes of the mesh over which moments and residuals are also spread,
            as in ZeRO stage 1: each leaf along its first unsharded dimension that is divisible by
            the size of the axis; other leaves stay as they are.
        memory_kind: the memory of moments and residuals, such as "pinned_host".

    Returns:
        A tree in the structure of `opt.init(params)` with a `jax.sharding.Sharding` for each leaf,
        as `out_shardings` of `jax.jit` takes it. In the state of `adamaxw` and of any other
        transformation, a leaf with the path and shape of a parameter is sharded like it; everything
        else is replicated. Only moments and residuals of `adamaxw` are spread.

    Raises:
        ValueError: an abstract leaf of params has no sharding, params are on several meshes or
            devices, or the mesh has no such axis.
    """
    everywhere = _everywhere(params)
    axes = (data_axis,) if isinstance(data_axis, str) else tuple(dict.fromkeys(data_axis))
    names = everywhere.mesh.axis_names if isinstance(everywhere, NamedSharding) else ()
    if not set(axes) <= set(names):
        raise ValueError(f"data_axis must be among the mesh axes of params {names}, got {axes}")
    # The params of optax.lookahead are two trees; its inner optimizer sees one of them.
    seen = params.fast if isinstance(params, optax.LookaheadParams) else params
    beside = {
        path: (np.shape(p), p.sharding if _places.is_placed(p) else everywhere)
        for path, p in tree_leaves_with_path(seen)
    }

    def follow(path: jax.tree_util.KeyPath, x: Any) -> Any:
        ends = (path[i:] for i in range(len(path) + 1))
        found = (beside[end] for end in ends if end in beside)
        return next((sharding for shape, sharding in found if shape == x.shape), everywhere)

    def of_tree(tree: Any, trains: list[bool]) -> list[Any]:
        # By paths inside moments or residuals, because a parameter may be called mu as well.
        shardings = []
        for (path, x), is_trained in zip(tree_leaves_with_path(tree), trains, strict=False):
            sharding = follow(path, x)
            # The update of a leaf that does not train is zeros_like(mu): place mu like the leaf.
            if axes and is_trained:
                sharding = _spread(sharding, x.shape, axes)
            if memory_kind is not None:
                sharding = sharding.with_memory_kind(memory_kind)
            shardings.append(sharding)
        return shardings

    def of_node(path: jax.tree_util.KeyPath, x: Any) -> list[Any]:
        if not is_state(x):
            return [follow(path, x)]
        trains = list(map(_leaves.trains, jax.tree.leaves(x.mu), jax.tree.leaves(x.nu)))
        mu, nu, residual = (of_tree(tree, trains) for tree in (x.mu, x.nu, x.residual))
        scale, seed = ([everywhere] * len(jax.tree.leaves(y)) for y in (x.nu_scale, x.seed))
        return [everywhere, *mu, *nu, *scale, *residual, *seed]

    leaves, treedef = jax.tree.flatten(params)
    found: list[Any] = []

    # Traced, because classes of the user may refuse anything but arrays in their nodes.
    def look(leaves: list[Any]) -> None:
        state = opt.init(treedef.unflatten(leaves))
        nodes = tree_leaves_with_path(state, is_leaf=is_state)
        found.append(_as_prefix(state, (x for node in nodes for x in of_node(*node))))

    jax.eval_shape(look, [_unplaced(p) for p in leaves])
    return found[0]


def _as_prefix(tree: Any, shardings: Iterator[Any]) -> Any:
    """The shardings of its leaves as a tree, or one for all of a node that only takes arrays."""
    parts, node = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.all_leaves([tree]):
        return next(shardings)
    parts = [_as_prefix(part, shardings) for part in parts]
    try:
        new = node.unflatten(parts)
        if all(x is y for x, y in zip(parts, node.flatten_up_to(new), strict=True)):
            return new
    except (TypeError, ValueError, AttributeError):
        pass  # the class of the node refuses what is no array
    first, *others = set(jax.tree.leaves(parts))
    if others:
        raise ValueError(f"{type(tree).__name__} holds only arrays: give its leaves one sharding")
    return first


def describe(tree: Any) -> Table:
    """A table of the arrays in a tree: the sharding of each, and its bytes per device.

    Args:
        tree: params or a state: arrays, or `jax.ShapeDtypeStruct` with shardings.

    Returns:
        A table for `print` or `rich.print`: for each leaf, the number of devices that share one
        copy, and the bytes of its part on one device, with totals. Another memory, such as that of
        the host, has a total of its own.

    Raises:
        TypeError: a leaf is not an array or has no sharding; names the path.

    Examples:
        >>> import adamaxw
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((8,), ("data",))
        >>> params = {"w": jnp.ones((64, 3)), "b": jnp.zeros(3)}
        >>> params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        >>> opt = adamaxw.adamaxw(1e-3)
        >>> shardings = adamaxw.sharding.of_state(opt, params, data_axis="data")
        >>> state = jax.jit(opt.init, out_shardings=shardings).eval_shape(params)
        >>> print(adamaxw.sharding.describe(state))
        path               shape    dtype    sharding         copies  bytes a device
        count              ()       int32    P()                   8               4
        mu/b               (3,)     float32  P()                   8              12
        mu/w               (64, 3)  float32  P('data', None)       1              96
        nu/b               (3,)     float32  P()                   8              12
        nu/w               (64, 3)  float32  P('data', None)       1              96
        a device                                                                 220
        in all, each once                                                      1,564
    """
    held: Counter[str | None] = Counter({None: 0})
    rows, in_all = [], 0
    for path, x, part, memory in _parts(tree):
        size, devices = math.prod(x.shape), x.sharding.num_devices
        copies = devices * part // size if size else devices
        where = str(x.sharding)
        if isinstance(x.sharding, NamedSharding):
            where = f"P({', '.join(map(repr, x.sharding.spec))})"
        elif isinstance(x.sharding, SingleDeviceSharding):
            where = "one device"
        if memory is not None:
            where += f", {memory}"
        part_bytes = part * x.dtype.itemsize
        held[memory] += part_bytes
        in_all += size * x.dtype.itemsize
        rows.append((path, str(x.shape), str(x.dtype), where, f"{copies}", f"{part_bytes:,}"))
    totals = {"a device" if kind is None else f"its {kind}": held[kind] for kind in held}
    totals["in all, each once"] = in_all
    return Table(
        columns=("path", "shape", "dtype", "sharding", "copies", "bytes a device"),
        rows=tuple(rows),
        footer=tuple((name, "", "", "", "", f"{total:,}") for name, total in totals.items()),
        right=("copies", "bytes a device"),
    )


def bytes_a_device(tree: Any) -> int:
    """The bytes of a tree on each device: the first total of `describe`."""
    return sum(part * x.dtype.itemsize for _, x, part, memory in _parts(tree) if memory is None)


def _parts(tree: Any) -> Iterator[tuple[str, Any, int, str | None]]:
    """Path, leaf, number of its elements on each device, and the memory if not the device's own."""
    for path, x in _paths.named_leaves(tree):
        sharding = getattr(x, "sharding", None)
        if not isinstance(sharding, Sharding):
            raise TypeError(f"{path!r} must be an array with a sharding, got {_checks.in_words(x)}")
        has_devices = not isinstance(getattr(sharding, "mesh", None), AbstractMesh)
        devices = sharding.addressable_devices if has_devices else ()
        own = next((device.default_memory().kind for device in devices), "device")
        memory = None if sharding.memory_kind == own else sharding.memory_kind
        yield path, x, math.prod(sharding.shard_shape(x.shape)), memory


def _everywhere(params: Any) -> Any:
    """The replicated sharding on the one mesh or device of params."""
    for path, p in tree_leaves_with_path(params):
        if isinstance(p, jax.ShapeDtypeStruct) and p.sharding is None:
            raise ValueError(f"params{keystr(path)} needs jax.ShapeDtypeStruct(..., sharding=...)")
    found = _places.places_of(params)
    if len(found) > 1 or None in found:
        raise ValueError(
            f"params must be on one device or have NamedShardings on one mesh, got {list(found)}"
        )
    return found.pop() if found else jnp.zeros(()).sharding


def _spread(sharding: NamedSharding, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """`sharding` over the axes as well, along the first dimension that can be split."""
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    used = jax.tree.leaves(spec)
    free = tuple(axis for axis in axes if axis not in used)
    parts = math.prod(sharding.mesh.shape[axis] for axis in free)
    for i, size in enumerate(shape):
        if free and not spec[i] and size and size % parts == 0:
            spec = PartitionSpec(*spec[:i], free, *spec[i + 1 :])
            return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return sharding


def _unplaced(p: Any) -> Any:
    is_array = isinstance(p, (jax.Array, jax.ShapeDtypeStruct))
    return jax.ShapeDtypeStruct(p.shape, p.dtype) if is_array else p
