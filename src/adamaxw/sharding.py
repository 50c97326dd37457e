"""Where the state of an optimizer lies on a mesh, before any of it is allocated.

The step is computed where the state lies, and adds no communication of its own. A state that is
spread over the axis of data parallelism is stage 1 of ZeRO (Rajbhandari et al., "ZeRO: Memory
Optimizations Toward Training Trillion Parameter Models", SC 2020,
https://arxiv.org/abs/1910.02054).
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from adamaxw import _leaves, _paths, _places
from adamaxw._state import AdamaxState
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
        ValueError: a leaf of params is abstract and has no sharding, or has axes that are reduced
            or unreduced, params are on several meshes or devices, the mesh has no such axis, or its
            devices no such memory.

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
    # The params of optax.lookahead are two trees, of which its optimizer sees one.
    seen = params.fast if isinstance(params, optax.LookaheadParams) else params
    beside = {
        path: (np.shape(p), p.sharding if _places.is_placed(p) else everywhere)
        for path, p in jax.tree_util.tree_leaves_with_path(seen)
    }

    def follow(path: jax.tree_util.KeyPath, x: Any) -> Any:
        ends = (path[i:] for i in range(len(path) + 1))
        found = (beside[end] for end in ends if end in beside)
        return next((sharding for shape, sharding in found if shape == x.shape), everywhere)

    def of_leaf(path: jax.tree_util.KeyPath, x: Any, trains: bool) -> Any:
        sharding = follow(path, x)
        # Updates of what does not train are its moments, and must lie like the parameter.
        if axes and trains:
            sharding = _spread(sharding, x.shape, axes)
        return sharding if memory_kind is None else sharding.with_memory_kind(memory_kind)

    def of_node(path: jax.tree_util.KeyPath, x: Any) -> list[Any]:
        """A sharding for each leaf."""
        if not isinstance(x, AdamaxState):
            return [follow(path, x)]
        moments = zip(jax.tree.leaves(x.mu), jax.tree.leaves(x.nu), strict=True)
        trains = [_leaves.trains(m, u) for m, u in moments]
        shardings: list[Any] = []
        for name, tree in x._asdict().items():
            # By paths inside each tree: a parameter may be called mu as well.
            rows = jax.tree_util.tree_leaves_with_path(tree)
            if name in ("mu", "nu", "residual"):
                pairs = zip(rows, trains, strict=tree is not None)
                shardings += [of_leaf(inner, leaf, t) for (inner, leaf), t in pairs]
            else:
                shardings += [everywhere] * len(rows)
        return shardings

    leaves, treedef = jax.tree.flatten(params)
    found: list[Any] = []

    # Inside, the nodes of the user's hold arrays, if traced ones.
    def look(leaves: list[Any]) -> None:
        state = opt.init(treedef.unflatten(leaves))
        rows = jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda x: isinstance(x, AdamaxState)
        )
        found.append(_as_prefix(state, [x for row in rows for x in of_node(*row)]))

    jax.eval_shape(look, [_unplaced(p) for p in leaves])
    return found[0]


def _as_prefix(tree: Any, shardings: list[Any]) -> Any:
    """The shardings of its leaves as a tree; as one for all of a node that holds arrays alone.

    Raises:
        ValueError: such a node has several.
    """
    parts, node = jax.tree.flatten(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.all_leaves([tree]):
        return shardings[0]
    rest = iter(shardings)
    sizes = [len(jax.tree.leaves(part)) for part in parts]
    parts = [_as_prefix(x, list(islice(rest, n))) for x, n in zip(parts, sizes, strict=True)]
    try:
        new = node.unflatten(parts)
        if all(x is y for x, y in zip(parts, node.flatten_up_to(new), strict=True)):
            return new
    except (TypeError, ValueError, AttributeError):
        pass  # A class of the user's, which looks at what it is given.
    if len(set(shardings)) > 1:
        raise ValueError(
            f"a {type(tree).__name__} in params takes nothing but arrays, so that its shardings "
            "cannot be told apart: shard its leaves alike"
        )
    return shardings[0]


def describe(tree: Any) -> Table:
    """A table of the arrays in a tree: how each is sharded, and its bytes on each device.

    Args:
        tree: arrays, or `jax.ShapeDtypeStruct` with shardings, of params or a state; a state that
            is not allocated yet is `jax.jit(opt.init, out_shardings=shardings).eval_shape(params)`.

    Returns:
        A table with the path, shape, dtype and sharding of each leaf, the devices that share one
        copy of it, and the bytes of its part on one device, and with totals; what lies in another
        memory, such as that of the host, is marked and has a total of its own. `print` shows it as
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
        seed               ()       uint32   P()                   8               4
        a device                                                                  66
        in all, each once                                                        402
    """
    held: Counter[str | None] = Counter({None: 0})
    rows, in_all = [], 0
    for path, x, part, memory in _parts(tree):
        size = math.prod(x.shape)
        is_named = isinstance(x.sharding, NamedSharding)
        devices = x.sharding.mesh.size if is_named else x.sharding.num_devices
        copies = devices * part // size if size else devices
        words = _words(x.sharding)
        words = words if memory is None else f"{words}, {memory}"
        part_bytes = part * x.dtype.itemsize
        held[memory] += part_bytes
        in_all += size * x.dtype.itemsize
        rows.append((path, str(x.shape), str(x.dtype), words, f"{copies}", f"{part_bytes:,}"))
    totals = [("a device" if kind is None else f"its {kind}", held[kind]) for kind in held]
    return Table(
        columns=("path", "shape", "dtype", "sharding", "copies", "bytes a device"),
        rows=tuple(rows),
        footer=tuple(
            (words, "", "", "", "", f"{total:,}")
            for words, total in (*totals, ("in all, each once", in_all))
        ),
        right=("copies", "bytes a device"),
    )


def bytes_a_device(tree: Any) -> int:
    """The bytes of the parts of a tree on each device: the total of `describe`.

    What lies in another memory, such as that of the host, is not counted.

    Args:
        tree: as for `describe`.

    Raises:
        TypeError, ValueError: as from `describe`.
    """
    return sum(part * x.dtype.itemsize for _, x, part, memory in _parts(tree) if memory is None)


def _words(sharding: Sharding) -> str:
    if isinstance(sharding, NamedSharding):
        return f"P({', '.join(map(repr, sharding.spec))})"
    return "one device" if isinstance(sharding, SingleDeviceSharding) else str(sharding)


def _parts(tree: Any) -> Iterator[tuple[str, Any, int, str | None]]:
    """Path, leaf, how many of its elements are on each device, and the memory if not its own."""
    for path, x in _paths.named(tree):
        if not isinstance(getattr(x, "sharding", None), Sharding):
            raise TypeError(
                f"{path!r} must be an array, or a jax.ShapeDtypeStruct with a sharding, got "
                f"{_leaves.describe(x)}"
            )
        try:
            part = math.prod(x.sharding.shard_shape(x.shape))
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
        yield path, x, part, _other_memory(x.sharding)


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
        if _places.is_placed(p):
            spec = getattr(p.sharding, "spec", None)
            is_partial = getattr(spec, "reduced", None) or getattr(spec, "unreduced", None)
            if is_partial or not isinstance(p.sharding, (NamedSharding, SingleDeviceSharding)):
                raise ValueError(
                    f"{name} must have a NamedSharding without axes that are reduced or unreduced, "
                    f"or a SingleDeviceSharding, got {p.sharding}"
                )
    found = _places.places(params)
    if len(found) > 1:
        raise ValueError(
            f"params must be on one mesh or on one device, got {', '.join(map(str, found))}"
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
                f"data_axis must be of the mesh of params, which has the axes {names}, got "
                f"{axis!r}; jax.device_put with shardings puts params on a mesh"
            )
    if len(set(axes)) < len(axes):
        raise ValueError(f"data_axis must name each axis once, got {data_axis!r}")
    return tuple(axes)


def _check_memory(kind: str | None, everywhere: Any) -> None:
    device = _one_device(everywhere)
    if kind is None or device is None:
        return
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kind not in kinds:
        raise ValueError(
            f"memory_kind must be one that {device.platform} devices have, "
            f"{', '.join(map(repr, kinds))}, got {kind!r}"
        )


def _one_device(sharding: Any) -> Any:
    """A device of this process; None for an abstract mesh, and for one of other processes."""
    if isinstance(getattr(sharding, "mesh", None), AbstractMesh):
        return None
    return min(sharding.addressable_devices, key=lambda device: device.id, default=None)


def _other_memory(sharding: Any) -> str | None:
    """The kind of memory, unless it is the one in which a device computes."""
    device, kind = _one_device(sharding), sharding.memory_kind
    usual = "device" if device is None else device.default_memory().kind
    return None if kind == usual else kind


def _spread(sharding: NamedSharding, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """`sharding` over the axes as well, along the first dimension that can be split."""
    spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    used = jax.tree.leaves(spec)
    free = tuple(axis for axis in axes if axis not in used)
    parts = math.prod(sharding.mesh.shape[axis] for axis in free)
    for i, size in enumerate(shape):
        if free and not spec[i] and size and size % parts == 0:
            spec[i] = free
            return NamedSharding(
                sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind
            )
    return sharding


def _unplaced(p: Any) -> Any:
    is_array = isinstance(p, (jax.Array, jax.ShapeDtypeStruct))
    return jax.ShapeDtypeStruct(p.shape, p.dtype) if is_array else p
