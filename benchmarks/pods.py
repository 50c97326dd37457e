"""A training step compiled for whole TPU pods: communication and bytes per device.

libtpu compiles for TPU on any machine; nothing is run. The step is a loss with two matrix products,
its gradients, and the optimizer. The update alone is also compiled with the shapes of Llama-3-8B.
Run it in the environment that `make accelerators` creates:

    .venv-accelerators/bin/python benchmarks/pods.py     # writes results/pods.json
"""

import os
import time
from collections import Counter
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import chips
import jax
import jax.numpy as jnp
import optax
import results
import scaling
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scaling import Format
from versions import versions

import adamaxw
from adamaxw.sharding import bytes_a_device

RESULTS = Path(__file__).parent / "results" / "pods.json"
WIDTH = 8192  # of both matrices
ROWS = 256  # of the batch, per device


class Pod(NamedTuple):
    """A topology, with one mesh axis per dimension of its torus.

    Moments, and with FSDP parameters too, are sharded over the first `spread` axes.
    """

    topology: str
    shape: tuple[int, ...]
    spread: int


V5E = Pod("v5e:16x16", (16, 16), 2)
V6E = Pod("v6e:16x16", (16, 16), 2)
V5P = Pod("v5p:16x16x16", (16, 16, 16), 3)
# The largest slice on offer. 8192 is not divisible by all 6,144 devices.
V5P_LARGEST = Pod("v5p:16x16x24", (16, 16, 24), 2)
# Two devices per chip.
V7X = Pod("tpu7x:16x16x16", (16, 16, 16, 2), 2)


class Way(Enum):
    """How gradients are summed, and deviations from the recipe of docs/scaling.md."""

    AT_ONCE = "at once"
    UNPLACED = "at once, params without a sharding"
    BY_AXIS = "axis by axis"
    EXPLICIT = "axis by axis, explicit axes"


class Step(NamedTuple):
    """A training step to compile."""

    pod: Pod
    strategy: str
    way: Way
    format: Format


FORMATS = (
    Format("float32", None, "nearest"),
    Format("float32", "uint8", "nearest"),
    Format("bfloat16", "uint8", "stochastic"),
    Format("bfloat16", "uint8", "exact"),
)
STEPS = (
    *(Step(V5E, "ZeRO-1", way, FORMATS[0]) for way in (Way.AT_ONCE, Way.UNPLACED, Way.EXPLICIT)),
    Step(V5E, "FSDP", Way.AT_ONCE, FORMATS[0]),
    *(Step(V5E, s, Way.BY_AXIS, fmt) for s in scaling.STRATEGIES for fmt in FORMATS),
    *(Step(V5P_LARGEST, s, Way.AT_ONCE, FORMATS[0]) for s in scaling.STRATEGIES),
    *(
        Step(pod, s, Way.BY_AXIS, fmt)
        for pod in (V5P_LARGEST, V5P, V6E, V7X)
        for s in scaling.STRATEGIES
        for fmt in (FORMATS[0], FORMATS[-1])
    ),
)
# With ZeRO-1, parameters and gradients are not sharded, which does not fit on v5e.
UPDATES = ((V5E, ("FSDP",)), (V5P, scaling.STRATEGIES))


def devices_of(pod: Pod) -> Any:
    """Devices to compile for."""
    os.environ |= chips.LIBTPU
    return topologies.get_topology_desc(topology_name=pod.topology, platform="tpu").devices


def mesh_of(pod: Pod, devices: Any, axis_type: AxisType = AxisType.Auto) -> Mesh:
    """The mesh with axes x, y, z and core."""
    names = ("x", "y", "z", "core")[: len(pod.shape)]
    types = (axis_type,) * len(names)
    return jax.make_mesh(pod.shape, names, axis_types=types, devices=devices)


def loss(params: Any, batch: jax.Array) -> jax.Array:
    """Two matrix products."""
    return jnp.mean((jax.nn.relu(batch @ params["first"]) @ params["second"]) ** 2)


def compiled(job: Step, devices: Any) -> dict[str, Any]:
    """Compiles a step, with params and state donated, and its update alone, on sharded gradients.

    Collectives of the step that are not in the update belong to the loss and its gradients.
    """
    explicit = job.way is Way.EXPLICIT
    mesh = mesh_of(job.pod, devices, AxisType.Explicit if explicit else AxisType.Auto)
    axes = mesh.axis_names[: job.pod.spread]
    optimizer = scaling.optimizer_of(job.format)

    def abstract(shape: tuple[int, ...], *spec: Any) -> Any:
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(job.format.dtype), sharding=sharding)

    matrix, spec = (WIDTH, WIDTH), (axes,) if job.strategy == "FSDP" else ()
    params: Any = {name: abstract(matrix, *spec) for name in ("first", "second")}
    shardings = adamaxw.sharding.of_state(optimizer, params, data_axis=axes)
    state = jax.jit(optimizer.init, out_shardings=shardings).eval_shape(params)
    batch = abstract((ROWS * mesh.size, WIDTH), mesh.axis_names)
    grads = {name: abstract(matrix, axes) for name in params}

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        if not explicit:
            return optax.apply_updates(params, updates), state
        part = optax.apply_updates(jax.sharding.reshard(params, P(axes)), updates)
        return jax.sharding.reshard(part, P()), state

    def step(params: Any, state: Any, batch: Any) -> Any:
        if explicit:
            to_sum = jax.sharding.reshard(params, P(reduced=frozenset(axes)))
            grads = jax.grad(loss)(to_sum, batch)
            grads = jax.sharding.reshard(grads, P(axes[0], unreduced=frozenset(axes[1:])))
            return update(params, state, jax.sharding.reshard(grads, P(axes)))
        grads = jax.grad(loss)(params, batch)
        if job.way is Way.BY_AXIS:
            grads = jax.lax.with_sharding_constraint(grads, NamedSharding(mesh, P(axes[0])))
        return update(params, state, grads)

    where = jax.tree.map(lambda x: x.sharding, (params, state))
    given, donated = params, (0, 1)
    if job.way is Way.UNPLACED:  # XLA then shards them differently from the new ones
        given = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        donated = (1,)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        program = (
            jax.jit(step, out_shardings=where, donate_argnums=donated)
            .lower(given, state, batch)
            .compile()
        )
        alone = (
            jax.jit(update, out_shardings=where, donate_argnums=(0, 1))
            .lower(params, state, grads)
            .compile()
        )
    seconds = time.perf_counter() - start
    memory: Any = program.memory_analysis()
    of_step, of_update = map(communication, (program, alone))
    if of_update - of_step:
        raise AssertionError(f"{of_update} of the update are not in the step, {of_step}")
    return {
        "topology": job.pod.topology,
        "devices": mesh.size,
        "strategy": job.strategy,
        "way": job.way.value,
        "format": list(job.format),
        "gradients": dict(of_step - of_update),
        "update": dict(of_update),
        "planned": bytes_a_device((params, state, batch)),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": round(seconds, 1),
    }


def communication(program: Any) -> Counter[str]:
    """The collectives of a compiled program, with their results."""
    return Counter(" ".join(found) for found in scaling.collectives(program.as_text()))


def without_optimizer(pod: Pod, devices: Any) -> list[dict[str, Any]]:
    """The compiled sum and gather of one array over all chips."""
    mesh = mesh_of(pod, devices)
    axes = mesh.axis_names

    def scatter(x: jax.Array, *parts: Any) -> jax.Array:
        for part in parts:
            x = jax.lax.psum_scatter(x, part, tiled=True)
        return x

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axes, tiled=True)

    rows = []
    for name, f, before, after in (
        ("psum_scatter, at once", lambda x: scatter(x, axes), P(), P(axes)),
        ("psum_scatter, axis by axis", lambda x: scatter(x, *axes), P(), P(axes)),
        ("all_gather", gather, P(axes), P()),
    ):
        x = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, before))
        f = jax.shard_map(f, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)
        found = communication(jax.jit(f).lower(x).compile())
        rows.append({"topology": pod.topology, "operation": name, "collectives": found})
    return rows


def table_without_optimizer(found: dict[str, Any]) -> list[str]:
    """The sums and gathers as a table in Markdown."""
    lines = ["| topology | `jax.lax` | compiled |", "|---|---|---|"]
    for row in found["without_optimizer"]:
        words = _words(row["collectives"])
        lines.append(f"| {row['topology']} | {row['operation']} | {words} |")
    return lines


def table(found: dict[str, Any]) -> list[str]:
    """The compiled steps as a table in Markdown."""
    lines = [
        "| topology, devices | strategy | parameters, moments, rounding | loss and gradients | "
        "update | planned | compiled | temporaries |",
        "|---|---|---|---|---|--:|--:|--:|",
    ]
    for row in found["steps"]:
        gb = (f"{row[key] / 1e9:.4f}" for key in ("planned", "arguments", "temporaries"))
        which = f"{row['topology']}, {row['devices']:,} | {row['strategy']}, {row['way']}"
        communicated = f"{_words(row['gradients'])} | {_words(row['update'])}"
        lines.append(f"| {which} | {Format(*row['format'])} | {communicated} | {' | '.join(gb)} |")
    return lines


def _words(found: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(found.items())) or "none"


def main() -> None:
    """Compiles all of them, writes the results and prints the tables."""
    jax.config.update("jax_platforms", "cpu")
    found: dict[str, Any] = {
        "command": "python benchmarks/pods.py",
        "versions": f"{versions()}, libtpu {version('libtpu')}",
        "without_optimizer": [],
        "steps": [],
        "rows": [],
    }
    for pod in (V5E, V5P):
        found["without_optimizer"] += without_optimizer(pod, devices_of(pod))
    for job in STEPS:
        found["steps"].append(compiled(job, devices_of(job.pod)))
        print(found["steps"][-1], flush=True)
    for pod, strategies in UPDATES:
        devices = devices_of(pod)
        for strategy in strategies:
            for fmt in FORMATS:
                job = scaling.Compiled("Llama-3-8B", len(devices), 1, strategy, fmt)
                found["rows"].append(scaling.compiled(job, devices))
                print(found["rows"][-1], flush=True)
    results.write(RESULTS, found)
    for lines in (table_without_optimizer, table, scaling.compiled_table):
        print("\n".join(lines(found)), "\n")


if __name__ == "__main__":
    main()
