"""Measures one section on one tree, in a process of its own.

`speed.py` starts it with a job as JSON, and reads a row of JSON from each line that it prints.
"""

import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import jax
import psutil
from contenders import CONTENDERS, REFERENCE, Contender
from runners import Runner
from trees import Data, Shapes, count, shapes

Row = dict[str, Any]

# Too large for any cache, and on an accelerator large enough to hide the cost of a call.
_BANDWIDTH_BYTES = {"cpu": 2**29, "gpu": 2**32, "tpu": 2**32}
_ROUNDS_IN_TURN = 3


def _data(contender: Contender, tree: Shapes, sets: int) -> Data:
    return Data(tree, contender.dtype, sets)


def _sets(contenders: list[Contender], tree: Shapes, memory: int) -> int:
    """How many sets of gradients fit in memory, up to 2."""
    fitting = [s for s in (1, 2) if harness.needs(contenders, count(tree), s) <= memory]
    return max(fitting, default=0)


def _per_parameter(row: Row, contender: Contender, tree: Shapes) -> Row:
    """Adds bytes per parameter, and the bandwidth that moving the least of them took."""
    parameters = count(tree)
    kinds = ("state_bytes", "program_bytes", "temporaries")
    found = {kind: round(row[kind] / parameters, 3) for kind in kinds if kind in row}
    # Gradients are read, parameters and state are read and written.
    least = round(3 * _item(contender) + 2 * found["state_bytes"], 3)
    needed = float(f"{least * parameters / row['seconds']['median']:.4g}")
    return row | found | {"least_bytes": least, "least_bandwidth": needed}


def _item(contender: Contender) -> int:
    return 2 if contender.dtype == "bfloat16" else 4


def step(tree: Shapes, contenders: list[Contender], budget: float, rounds: int) -> Iterator[Row]:
    """Time of a step of each, relative to the reference."""
    bandwidth = float(f"{harness.copy_bandwidth(_BANDWIDTH_BYTES[jax.default_backend()]):.4g}")
    memory = harness.available_memory()
    kept: tuple[int, Runner] | None = None
    for contender in contenders:
        pair = [REFERENCE, contender]
        sets = _sets(pair, tree, memory)
        if sets:
            if kept is None or kept[0] != sets:
                kept = None
                gc.collect()
                kept = sets, REFERENCE.make().build(_data(REFERENCE, tree, sets))
            runner = contender.make().build(_data(contender, tree, sets))
            row = harness.paired(kept[1], runner, budget, rounds)
            del runner
        else:
            kept = None
            row = _in_turn(tree, pair, memory)
        gc.collect()
        if "seconds" in row:
            row = _per_parameter(row, contender, tree)
            row |= {"bandwidth": bandwidth, "gradient_sets": sets or 1}
        yield {"contender": contender.name} | row


def _in_turn(tree: Shapes, pair: list[Contender], memory: int) -> Row:
    """Time of a step if the two do not fit in memory together."""
    for contender in pair:
        if not _sets([contender], tree, memory):
            needed = harness.needs([contender], count(tree), 1)
            return {
                "skipped": f"{contender.name} needs about {needed / 1e9:.0f} GB of memory, "
                f"{memory / 1e9:.0f} GB are available"
            }

    def build(contender: Contender) -> Callable[[], Runner]:
        return lambda: contender.make().build(_data(contender, tree, 1))

    return harness.in_turn(build(pair[0]), build(pair[1]), _ROUNDS_IN_TURN)


def eager(tree: Shapes, contenders: list[Contender], budget: float, rounds: int) -> Iterator[Row]:
    """Time of the update without jit, relative to the reference."""
    reference = REFERENCE.make().eager(_data(REFERENCE, tree, 2))
    for contender in contenders:
        runner = contender.make().eager(_data(contender, tree, 2))
        row = harness.paired(reference, runner, budget, rounds)
        kinds = ("ratio", "seconds", "reference_seconds", "rounds", "repeats", "mode")
        yield {"contender": contender.name} | {kind: row[kind] for kind in kinds}
        del runner
        gc.collect()


def compile_times(tree: Shapes, contenders: list[Contender]) -> Iterator[Row]:
    """Seconds to trace and to compile, cold: one contender per process."""
    (contender,) = contenders
    found = contender.make().compile_times(tree, contender.dtype)
    yield {"contender": contender.name, **found}


def memory(tree: Shapes, contenders: list[Contender]) -> Iterator[Row]:
    """Peak memory beyond what the process held before it allocated arrays."""
    (contender,) = contenders
    build = contender.make()
    # A tiny run first, because libraries, backends and compilers are loaded at their first use.
    tiny = build.build(_data(contender, {"leaf": (8,)}, 1))
    harness.warm_up(tiny)
    before = psutil.Process().memory_info().rss
    runner = build.build(_data(contender, tree, 1))
    harness.warm_up(runner)
    peak = runner.device_peak()
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    least = 2 * _item(contender) + runner.state_bytes() / count(tree)
    yield {
        "contender": contender.name,
        "peak_bytes": round(peak / count(tree), 3),
        "least_bytes": round(least, 3),
        "total_bytes": peak,
    }


def machine() -> Iterator[Row]:
    """The devices of JAX."""
    yield {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}


SECTIONS: dict[str, Callable[..., Iterator[Row]]] = {
    "step": step,
    "growth": step,
    "eager": eager,
    "compile": compile_times,
    "memory": memory,
}


def main() -> None:
    """Prints a row per contender of the job, as soon as it is measured."""
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Keeps what libraries print out of the rows.
    job = json.loads(sys.argv[1])
    section = job.pop("section")
    if section == "machine":
        found = machine()
    else:
        tree = shapes(job.pop("tree"))
        chosen = [CONTENDERS[name] for name in job.pop("contenders")]
        found = SECTIONS[section](tree, chosen, **job)
    for row in found:
        print(json.dumps(row), file=rows, flush=True)


if __name__ == "__main__":
    main()
