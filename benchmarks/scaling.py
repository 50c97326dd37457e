"""Llama 3 on 8 to 4,096 devices: planned bytes per device, and the compiled update.

The shapes are abstract, so neither memory nor devices are needed: `jax.eval_shape`, an abstract
mesh and `adamaxw.sharding` tell what each device would hold. With --compile, the update is also
compiled for meshes of up to 2,048 virtual CPU devices, and memory and communication of the compiled
program are compared with the plan. Run it with

    python benchmarks/scaling.py              # prints the plan
    python benchmarks/scaling.py --compile    # compiles, too; writes results/scaling.json
"""

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import results
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from versions import versions

import adamaxw
from adamaxw.sharding import bytes_a_device

RESULTS = Path(__file__).parent / "results" / "scaling.json"
DEVICES = (8, 64, 512, 4096)
STRATEGIES = ("ZeRO-1", "FSDP")
VOCABULARY, HEADS = 128_256, 1024


class Llama(NamedTuple):
    """A model of "The Llama 3 Herd of Models" (2024), table 3."""

    width: int
    hidden: int
    layers: int


MODELS = {
    "Llama-3-8B": Llama(4096, 14_336, 32),
    "Llama-3-70B": Llama(8192, 28_672, 80),
    "Llama-3-405B": Llama(16_384, 53_248, 126),
}


class Format(NamedTuple):
    """How parameters and moments are stored, by the names of the arguments."""

    dtype: str
    moment_dtype: str | None
    param_rounding: str

    def __str__(self) -> str:
        rounding = f", {self.param_rounding}" if self.dtype != "float32" else ""
        return f"{self.dtype}, {self.moment_dtype or 'float32'}{rounding}"


# Float32 parameters are not rounded, and "stochastic" has the bytes of "nearest".
FORMATS = (
    *(Format("float32", moments, "nearest") for moments in (None, "bfloat16", "uint8")),
    *(
        Format("bfloat16", moments, rounding)
        for moments in (None, "bfloat16", "uint8")
        for rounding in ("nearest", "stochastic", "exact")
    ),
)


class Compiled(NamedTuple):
    """An update to compile; `data` and `tensor` are the devices along the two mesh axes."""

    model: str
    data: int
    tensor: int
    strategy: str
    format: Format


_SMALL = Format("bfloat16", "uint8", "stochastic")
COMPILED = (
    *(Compiled("Llama-3-8B", n, 1, s, _SMALL) for n in (8, 64, 512) for s in STRATEGIES),
    *(Compiled("Llama-3-8B", 512, 1, "FSDP", fmt) for fmt in FORMATS),
    Compiled("Llama-3-70B", 2048, 1, "FSDP", _SMALL),
    Compiled("Llama-3-70B", 64, 8, "ZeRO-1", _SMALL),
    Compiled("Llama-3-405B", 2048, 1, "FSDP", _SMALL),
    Compiled("Llama-3-405B", 2048, 1, "FSDP", Format("bfloat16", "uint8", "exact")),
    Compiled("Llama-3-405B", 128, 16, "ZeRO-1", _SMALL),
)


def shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, with layers stacked as for `jax.lax.scan`."""
    width, hidden, layers = MODELS[model]
    layer = {
        "query": (width, width),
        "key": (width, HEADS),
        "value": (width, HEADS),
        "output": (width, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "norm_1": (width,),
        "norm_2": (width,),
    }
    outer = {"embedding": (VOCABULARY, width), "logits": (width, VOCABULARY), "norm": (width,)}
    return outer | {name: (layers, *shape) for name, shape in layer.items()}


def parameters(model: str) -> int:
    """Number of parameters."""
    return sum(map(math.prod, shapes(model).values()))


def place(shape: tuple[int, ...], mesh: Any, strategy: str) -> NamedSharding:
    """The sharding of a parameter: split over "model", and with FSDP over "data", if possible.

    Each axis splits the largest dimension that is divisible and not yet split.
    """
    spec: list[Any] = [None] * len(shape)
    for axis in ("model", "data") if strategy == "FSDP" else ("model",):
        parts = mesh.shape[axis]
        free = [i for i, size in enumerate(shape) if spec[i] is None and size % parts == 0]
        if free and parts > 1:
            spec[max(free, key=lambda i: shape[i])] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))


class Run(NamedTuple):
    """Abstract arrays of a training run, with shardings."""

    params: Any
    grads: Any
    state: Any


def run(optimizer: Any, model: str, dtype: str, mesh: Any, strategy: str) -> Run:
    """What the mesh holds once gradients are computed; with ZeRO-1 those are not sharded."""
    params: Any = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place(shape, mesh, strategy))
        for name, shape in shapes(model).items()
    }
    shardings = adamaxw.sharding.of_state(optimizer, params, data_axis="data")
    state = jax.jit(optimizer.init, out_shardings=shardings).eval_shape(params)
    return Run(params, params, state)


def optimizer_of(fmt: Format) -> optax.GradientTransformationExtraArgs:
    """AdamaxW in a format."""
    return adamaxw.adamaxw(1e-3, moment_dtype=fmt.moment_dtype, param_rounding=fmt.param_rounding)


def plan(model: str) -> list[str]:
    """A table in Markdown: gigabytes per device of parameters, gradients and state."""
    columns = [f"{strategy}, {n:,}" for strategy in STRATEGIES for n in DEVICES]
    lines = [
        f"| parameters | moments | rounding | {' | '.join(columns)} |",
        "|---|---|---|" + "--:|" * len(columns),
    ]
    cells: dict[tuple[str, ...], list[str]] = {}
    for fmt in FORMATS:
        row = []
        for strategy in STRATEGIES:
            for n in DEVICES:
                mesh = AbstractMesh((n, 1), ("data", "model"))
                found = run(optimizer_of(fmt), model, fmt.dtype, mesh, strategy)
                row.append(f"{_gb(bytes_a_device(found))} ({_gb(bytes_a_device(found.state))})")
        rounding = "" if fmt.dtype == "float32" else fmt.param_rounding
        cells[fmt.dtype, fmt.moment_dtype or "float32", rounding] = row
    for (dtype, moments, rounding), row in cells.items():
        if rounding == "stochastic":
            if row != cells[dtype, moments, "nearest"]:
                raise AssertionError("stochastic rounding keeps nothing")
            continue
        words = "nearest, stochastic" if rounding == "nearest" else rounding
        lines.append(f"| {dtype} | {moments} | {words} | {' | '.join(row)} |")
    return lines


def _gb(size: float) -> str:
    """Gigabytes (10^9 bytes), to three digits."""
    digits = max(0, 2 - math.floor(math.log10(max(size, 1) / 1e9)))
    return f"{size / 1e9:,.{min(digits, 4)}f}"


def collectives(text: str) -> list[tuple[str, str]]:
    """The collectives in compiled HLO: kind and shape of each result.

    For TPU, XLA spreads an asynchronous collective over several fusions, of which the first counts,
    and writes a reduce-scatter as a fusion of an all-reduce and a slice.
    """
    kinds = (
        "all-gather|all-reduce|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|"
        "collective-broadcast"
    )
    found = []
    for computation in re.split(r"\n(?=%|ENTRY)", text):
        head = computation.partition("\n")[0]
        if head.startswith("%async_collective_fusion") or "AsyncCollectiveDone" in computation:
            continue
        for result, kind, start in re.findall(rf"= (.*?) ({kinds})(-start)?\(", computation):
            if head.startswith("%all-reduce-scatter"):
                kind, result = "reduce-scatter", head.partition("->")[2]
            shapes = re.findall(r"\w+\[[\d,]*\]", result)
            if start and kind != "all-reduce":  # operands, results and counters
                shapes = shapes[1:2]
            found += [(kind, shape) for shape in shapes]
    return found


def compiled(job: Compiled, devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Compiles an update and its application, with params and state donated."""
    shape, names = (job.data, job.tensor), ("data", "model")
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2, devices=devices)
    optimizer = optimizer_of(job.format)
    found = run(optimizer, job.model, job.format.dtype, mesh, job.strategy)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    where = jax.tree.map(lambda x: x.sharding, (found.params, found.state))
    start = time.perf_counter()
    program = (
        jax.jit(step, out_shardings=where, donate_argnums=(0, 1))
        .lower(found.params, found.state, found.grads)
        .compile()
    )
    seconds = time.perf_counter() - start
    memory: Any = program.memory_analysis()
    return {
        "model": job.model,
        "mesh": [job.data, job.tensor],
        "strategy": job.strategy,
        "format": list(job.format),
        "planned": bytes_a_device(found),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "collectives": dict(Counter(kind for kind, _ in collectives(program.as_text() or ""))),
        "seconds": round(seconds, 2),
    }


def compiled_table(found: dict[str, Any]) -> list[str]:
    """The compiled updates as a table in Markdown."""
    lines = [
        "| model | devices | parameters, moments, rounding | planned | compiled | temporaries | "
        "communication |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for row in found["rows"]:
        data, tensor = row["mesh"]
        devices = f"{data:,}" if tensor == 1 else f"{data:,} x {tensor}"
        sizes = " | ".join(_gb(row[key]) for key in ("planned", "arguments", "temporaries"))
        kinds = ", ".join(f"{number} {kind}" for kind, number in row["collectives"].items())
        lines.append(
            f"| {row['model']} | {devices}, {row['strategy']} | {Format(*row['format'])} | "
            f"{sizes} | {kinds or 'none'} |"
        )
    return lines


def main() -> None:
    """Prints the plan; compiles if asked."""
    parser = argparse.ArgumentParser(description="Plan the memory of Llama 3 on many devices.")
    parser.add_argument("--compile", action="store_true", help="for CPU devices, up to 2,048")
    args = parser.parse_args()
    for model in MODELS:
        print(f"{model}, {parameters(model):,} parameters; GB per device, of which (state)\n")
        print("\n".join(plan(model)), "\n")
    if not args.compile:
        return
    # These devices need no memory; more than 2,048 do not fit in one process.
    jax.config.update("jax_num_cpu_devices", 2048)
    rows = []
    for job in COMPILED:
        rows.append(compiled(job))
        print(rows[-1], flush=True)
    found = {
        "command": "python benchmarks/scaling.py --compile",
        "versions": versions(),
        "rows": rows,
    }
    results.write(RESULTS, found)
    print("\n".join(compiled_table(found)))


if __name__ == "__main__":
    main()
