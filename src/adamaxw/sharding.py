"""Where the state of an optimizer lies on a mesh, before any of it is allocated.

The step is computed where the state lies, and adds no communication of its own. A state that is
spread over the axis of data parallelism is stage 1 of ZeRO (Rajbhandari et al., "ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models", SC 2020,
https://arxiv.org/abs/1910.02054).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

from adamaxw import _leaves, _paths, _places
from adamaxw._optimizer import AdamaxState
from adamaxw._table import Table


def of_state(
    opt: optax.GradientTransformation,
    params: optax.Params,
    *,
    data_axis: str | Sequence[str] = (),
    memory_kind: str | None = None,
) -> Any:
    """Shardings for the state of an optimizer, from those of the parameters.

    Args:
        opt: `adamaxw`, `adamax`, or a chain or wrapper around them.
        params: the parameters: arrays, or `jax.ShapeDtypeStruct` with shardings, all on one mesh,
            concrete or abstract, with automatic or explicit axes, or all on one device. Numbers,
            and arrays that are committed to no place, count as replicated.
        data_axis: the axis of the mesh, or several, over which moments and residuals are spread as
            well, as in ZeRO stage 1: each leaf along its first dimension that is not sharded and
            can be divided by the size of the axis. A leaf that has none stays as it is, and so does
            one that is sharded over the axis already.
        memory_kind: where moments and residuals lie, such as "pinned_host"; None: in the memory of
            the parameters.

    Returns:
        A tree in the structure of `opt.init(params)` with a `jax.sharding.Sharding` for each leaf,
        as `out_shardings` of `jax.jit` takes it. In the state of `adamaxw`, and of any other
        transformation, what lies beside a parameter, at its path and in its shape, is sharded like
        it; everything else is replicated. Only moments and residuals of `adamaxw` are spread.

    Raises:
        TypeError: from `opt.init`; or a leaf of params is traced, or no array.
        ValueError: a leaf of params is abstract and has no sharding, params are on several meshes
            or devices, the mesh has no such axis, or its devices no such memory.

    Examples:
        >>> import adamaxw
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((8,), ("data",))
        >>> params = jax.device_put(jnp.ones((64, 3)), NamedSharding(mesh, PartitionSpec()))
        >>> opt = adamaxw.adamaxw(1e-3)
        >>> shardings = adamaxw.sharding.of_state(opt, params, data_axis="data")
        >>> state = jax.jit(opt.init, out_shardings=shardings)(params)
        >>> print(state.mu.addressable_shards[0].data.shape)
        (8, 3)
    """
    if not hasattr(opt, "init"):
        raise TypeError(f"opt must be an optimizer with an init, got {_leaves.describe(opt)}")
    everywhere = _everywhere(params)
    axes = _axes(data_axis, everywhere)
    _check_memory(memory_kind, everywhere)
    beside = {
        path: (np.shape(p), p.sharding if _places.is_placed(p) else everywhere)
        for path, p in jax.tree_util.tree_leaves_with_path(params)
    }

    def follow(path: jax.tree_util.KeyPath, x: Any) -> Any:
        ends = (path[i:] for i in range(len(path) + 1))
        shape, sharding = next((beside[end] for end in ends if end in beside), ((), everywhere))
        sharding = sharding if shape == x.shape else everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def spread(x: Any) -> Any:
        sharding = _spread(x.sharding, x.shape, axes) if axes else x.sharding
        if memory_kind is not None:
            sharding = sharding.with_memory_kind(memory_kind)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def spread_moments(x: Any) -> Any:
        if not isinstance(x, AdamaxState):
            return x
        mu, nu, residual = jax.tree.map(spread, (x.mu, x.nu, x.residual))
        return x._replace(mu=mu, nu=nu, residual=residual)

    state = jax.eval_shape(opt.init, jax.tree.map(_unplaced, params))
    state = jax.tree_util.tree_map_with_path(follow, state)
    state = jax.tree.map(spread_moments, state, is_leaf=lambda x: isinstance(x, AdamaxState))
    return jax.tree.map(lambda x: x.sharding, state)


def describe(tree: Any) -> Table:
    """A table of the arrays in a tree: how each is sharded, and its bytes on each device.

    Args:
        tree: arrays, or `jax.ShapeDtypeStruct` with shardings, of params or a state; a state that
            is not allocated yet is `jax.jit(opt.init, out_shardings=shardings).eval_shape(params)`.

    Returns:
        A table with the path, shape, dtype and sharding of each leaf, the devices that share one
        copy of it, and the bytes of its part on one device, and with totals. `print` shows it as
        text, `rich.print` with rules.

    Raises:
        TypeError: a leaf is no array, or has no sharding; names the path.
        ValueError: a leaf cannot be divided as its sharding says; names the path.

    Examples:
        >>> import adamaxw
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from jax.sharding import NamedSharding, PartitionSpec
        >>> mesh = jax.make_mesh((8,), ("data",))
        >>> params = {"w": jnp.ones((64, 3)), "b": jnp.zeros(3)}
        >>> params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        >>> opt = adamaxw.adamaxw(1e-3, moment_dtype="uint8")
        >>> shardings = adamaxw.sharding.of_state(opt, params, data_axis="data")
        >>> state = jax.jit(opt.init, out_shardings=shardings).eval_shape(params)
        >>> print(adamaxw.sharding.describe(state))
        path               shape    dtype    sharding         copies  bytes a device
        count              ()       int32    P()                   8               4
        mu/b               (3,)     int8     P()                   8               3
        mu/w               (64, 3)  int8     P('data', None)       1              24
        nu/b               (3,)     uint8    P()                   8               3
        nu/w               (64, 3)  uint8    P('data', None)       1              24
        nu_scale           ()       float32  P()                   8               4
        a device                                                                  62
        in all, each once                                                        398
    """
    rows = []
    for path, x in _paths.named(tree):
        part, size = _part(path, x), math.prod(x.shape)
        is_named = isinstance(x.sharding, NamedSharding)
        devices = x.sharding.mesh.size if is_named else x.sharding.num_devices
        copies = devices * part // size if size else devices
        words = f"P({', '.join(map(repr, x.sharding.spec))})" if is_named else "one device"
        part_bytes = f"{part * x.dtype.itemsize:,}"
        rows.append((path, str(x.shape), str(x.dtype), words, f"{copies}", part_bytes))
    in_all = sum(math.prod(x.shape) * x.dtype.itemsize for _, x in _paths.named(tree))
    return Table(
        columns=("path", "shape", "dtype", "sharding", "copies", "bytes a device"),
        rows=tuple(rows),
        footer=(
            ("a device", "", "", "", "", f"{bytes_a_device(tree):,}"),
            ("in all, each once", "", "", "", "", f"{in_all:,}"),
        ),
        right=("copies", "bytes a device"),
    )


def bytes_a_device(tree: Any) -> int:
    """The bytes of the parts of a tree on each device: the total of `describe`.

    Args:
        tree: as for `describe`.

    Raises:
        TypeError, ValueError: as from `describe`.
    """
    return sum(_part(path, x) * x.dtype.itemsize for path, x in _paths.named(tree))


def _part(path: str, x: Any) -> int:
    """How many elements of an array are on each device."""
    if not isinstance(getattr(x, "sharding", None), Sharding):
        raise TypeError(
            f"{path!r} must be an array, or a jax.ShapeDtypeStruct with a sharding, got "
            f"{_leaves.describe(x)}"
        )
    try:
        return math.prod(x.sharding.shard_shape(x.shape))
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def _everywhere(params: Any) -> Any:
    """The sharding of what is everywhere on the one mesh or device of the params."""
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        if isinstance(p, Tracer):
            raise TypeError(f"{name} is traced: call of_state outside jax.jit, on abstract params")
        if not _leaves.is_numeric(_leaves.as_array(p)):
            raise TypeError(f"{name} must be an array of numbers, got {_leaves.describe(p)}")
        if isinstance(p, jax.ShapeDtypeStruct) and p.sharding is None:
            raise ValueError(
                f"{name} is a jax.ShapeDtypeStruct without a sharding: those that "
                "jax.jit(init, out_shardings=...).eval_shape() gives have one"
            )
    found = _places.places(params)
    if len(found) > 1 or None in found:
        raise ValueError(
            "params must be on one mesh, with a NamedSharding each, or on one device, got "
            f"{', '.join(map(str, found))}"
        )
    return found.pop() if found else jnp.zeros(()).sharding


def _axes(data_axis: Any, everywhere: Any) -> tuple[str, ...]:
    axes = (data_axis,) if isinstance(data_axis, str) else data_axis
    if not isinstance(axes, (list, tuple)):
        raise TypeError(f"data_axis must be a string or a sequence of strings, got {data_axis!r}")
    names = everywhere.mesh.axis_names if isinstance(everywhere, NamedSharding) else ()
    for axis in axes:
        if axis not in names:
            raise ValueError(
                f"data_axis must be of the mesh of params, which has the axes {names}, got {axis!r}"
            )
    return tuple(axes)


def _check_memory(kind: str | None, everywhere: Any) -> None:
    if kind is None or isinstance(getattr(everywhere, "mesh", None), AbstractMesh):
        return
    device = min(everywhere.addressable_devices, key=lambda device: device.id)
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"memory_kind must be one that {device.platform} devices have, "
            f"{', '.join(map(repr, kinds))}, got {kind!r}"
        )


def _spread(sharding: NamedSharding, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """`sharding` over the axes as well, along the first dimension that can be split."""
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    used = jax.tree.leaves(spec)
    free = tuple(axis for axis in axes if axis not in used)
    parts = math.prod(sharding.mesh.shape[axis] for axis in free)
    for i, size in enumerate(shape):
        if free and not spec[i] and size and size % parts == 0:
            spec[i] = free[0] if len(free) == 1 else free
            spread = PartitionSpec(*spec)
            return NamedSharding(sharding.mesh, spread, memory_kind=sharding.memory_kind)
    return sharding


def _unplaced(p: Any) -> Any:
    is_array = isinstance(p, (jax.Array, jax.ShapeDtypeStruct))
    return jax.ShapeDtypeStruct(p.shape, p.dtype) if is_array else p
