"""Times contenders in processes of their own, in turn: flags of XLA hold for a whole process.

In each round each contender takes one step, and its time is divided by that of the first
contender in the same round: the machine's other load falls on all.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The trees are those of the other benchmarks.
sys.path.append(str(Path(__file__).parents[1]))
import trees

# Where the kernel puts the arrays of a process is luck too: processes start anew several times.
STARTS = {"8M": 3, "gpt2-small": 2}
ROUNDS = {"8M": 15, "gpt2-small": 7}
WARM_UP = 2

Run = tuple[Callable[[Any, Any, Any], tuple[Any, Any]], Any, Any, Any]


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        build: from the shapes of the leaves to `(step, params, state, grads)`, with
            `params, state = step(params, state, grads)`, done when it returns.
        flags: value of XLA_FLAGS.
    """

    build: Callable[[Sequence[tuple[int, ...]]], Run]
    flags: str = ""


def shapes(tree: str) -> list[tuple[int, ...]]:
    """Shapes of the leaves: "8M", one leaf of 8 million, or a name that `trees.shapes` knows."""
    return list(trees.shapes(f"{trees.LEAF}8e6" if tree == "8M" else tree).values())


def arrays(shapes: Sequence[tuple[int, ...]], seed: int) -> list[jax.Array]:
    """Leaves of normal numbers, the same for all contenders."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def jitted(
    leaf_shapes: Sequence[tuple[int, ...]],
    init: Callable[[Any], Any],
    step: Callable[[Any, Any, Any], Any],
    options: dict[str, Any] | None = None,
) -> Run:
    """A JAX step, compiled with params and state donated."""
    compiled = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    params = arrays(leaf_shapes, 0)

    def run(params: Any, state: Any, grads: Any) -> Any:
        return jax.block_until_ready(compiled(params, state, grads))

    return run, params, init(params), arrays(leaf_shapes, 1)


def is_worker() -> bool:
    """Whether this process is one that `main` has started."""
    return sys.argv[1:2] == ["--worker"]


def main(contenders: Mapping[str, Contender], tables: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Prints a table for each (tree, names of contenders); or, in a worker, takes steps.

    The command line says which trees and contenders to keep to, and how long to race.
    """
    if is_worker():
        _serve(contenders[sys.argv[2]], sys.argv[3])
        return
    options = _options(contenders)
    for tree, names in tables:
        names = [names[0], *(x for x in names[1:] if not options.only or x in options.only)]
        if len(names) == 1 or (options.trees and tree not in options.trees):
            continue
        count = sum(int(np.prod(shape)) for shape in shapes(tree))
        print(f"\n{tree}: {count:,} float32 parameters in {len(shapes(tree))} leaves\n")
        print("| contender | time, quartiles | median ms | least ms | from its reference |")
        print("|---|---|---|---|---|")
        chosen = {name: contenders[name] for name in names}
        _race(tree, chosen, options.starts or STARTS[tree], options.rounds or ROUNDS[tree])


def _options(contenders: Mapping[str, Contender]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("trees", nargs="*", help=f"of {list(STARTS)}; all if none is given")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="besides the first of each table"
    )
    parser.add_argument("--starts", type=int, help="of each process")
    parser.add_argument("--rounds", type=int, help="of each start")
    options = parser.parse_intermixed_args()
    unknown = {*options.trees} - {*STARTS} | {*options.only} - {*contenders}
    if unknown:
        parser.error(f"unknown: {sorted(unknown)}; contenders: {list(contenders)}")
    return options


def _serve(contender: Contender, tree: str) -> None:
    run, params, state, grads = contender.build(shapes(tree))
    gc.disable()
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("save "):
            np.save(line[5:].strip(), np.asarray(params[0]))
            print("saved", flush=True)
            continue
        begin = time.perf_counter()
        params, state = run(params, state, grads)
        print(time.perf_counter() - begin, flush=True)


def _race(tree: str, contenders: Mapping[str, Contender], starts: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    finals: dict[str, np.ndarray[Any, Any]] = {}
    for seed in range(starts):
        finals = _rounds(tree, contenders, rounds, seconds, np.random.default_rng(seed))
    first = np.array(next(iter(seconds.values())))
    for name, times in seconds.items():
        low, middle, high = np.percentile(np.array(times) / first, [25, 50, 75])
        # "uint8: what" is compared with "uint8: adamaxw".
        reference = f"{name.split(':')[0]}: adamaxw"
        apart = ""
        if reference in finals and name != reference:
            apart = f"{np.abs(finals[name] - finals[reference]).max():.1e}"
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        cells = name, ratio, f"{np.median(times) * 1e3:.1f}", f"{min(times) * 1e3:.1f}", apart
        print(f"| {' | '.join(cells)} |", flush=True)


def _rounds(
    tree: str,
    contenders: Mapping[str, Contender],
    rounds: int,
    seconds: dict[str, list[float]],
    rng: np.random.Generator,
) -> dict[str, np.ndarray[Any, Any]]:
    """Appends the times of one start; returns the first leaves after the last step."""
    workers: dict[str, subprocess.Popen[str]] = {}
    for name, contender in contenders.items():
        workers[name] = subprocess.Popen(
            [sys.executable, sys.argv[0], "--worker", name, tree],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": contender.flags},
        )
        if _ask(workers[name], None) != "ready":
            raise RuntimeError(f"{name} did not start")
    for index in range(WARM_UP + rounds):
        # In another order each time: a slow contender leaves its successor a slower machine.
        for name in rng.permutation(list(workers)).tolist():
            elapsed = float(_ask(workers[name], "step"))
            if index >= WARM_UP:
                seconds[name].append(elapsed)
    finals: dict[str, np.ndarray[Any, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, worker) in enumerate(workers.items()):
            path = f"{folder}/{index}.npy"
            _ask(worker, f"save {path}")
            finals[name] = np.load(path)
            worker.communicate()
    return finals


def _ask(worker: Any, question: str | None) -> str:
    if question is not None:
        worker.stdin.write(question + "\n")
        worker.stdin.flush()
    return worker.stdout.readline().strip()
