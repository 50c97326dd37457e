"""Where low-precision moments cost something: small tasks, no gradient noise, b2 near b1.

Eight tasks are trained from several seeds in each format, at a constant learning rate and at one
that falls to 0 from twice that. Every seed has its own data and initial parameters, the same for
all formats. Two more tables are of lone parameters: how near the minimum of a quadratic they get,
and how far they go on gradients that fall as fast as the norm. Run it with

    python benchmarks/few_bits.py               # writes results/few_bits.json, tables of the docs
    python benchmarks/few_bits.py --markdown    # prints the tables of the committed results
"""

import argparse
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from jax import random
from markdown_table import table
from small_tasks import TASKS, Task, descend
from versions import versions

import adamaxw

RESULTS = Path(__file__).parent / "results" / "few_bits.json"
PAGE = Path(__file__).parents[1] / "docs" / "low_precision.md"
FORMATS = {"float32": None, "bfloat16": "bfloat16", "uint8": "uint8"}
FEW = ("bfloat16", "uint8")
RATES = {"constant": 0.0, "to 0": 1.0}
KINDS = ("falling", "noise")
B1S, B2S = (0.9, 0.95), (0.9, 0.95, 0.98, 0.99, 0.999)
QUICK = 200
QUADRATIC_LR, QUADRATIC_STEPS = 0.01, 55_000
FALLING_STEPS = 160  # At a factor of 0.9 per step, from 1 to above eps.


def optimizer(name: str, lr: float, falls: Any, steps: int) -> Any:
    """Adamax in a format; constant rate, or with `falls=1` from twice that to 0."""
    return adamaxw.adamax(
        lambda count: lr * (1 + falls) * (1 - falls * jnp.asarray(count, jnp.float32) / steps),
        moment_dtype=FORMATS[name],
    )


def losses(task: Task, name: str) -> np.ndarray:
    """Final losses, of shape (rates, seeds)."""

    def train(item: Any) -> jax.Array:
        falls, key = item
        return task.train(optimizer(name, task.lr, falls, task.steps), key, task.steps)

    falls = jnp.repeat(jnp.array(list(RATES.values())), task.seeds)
    keys = jnp.tile(random.split(random.key(0), task.seeds), len(RATES))
    # As fast as jax.vmap on a CPU, and compiled in half the time.
    found = jax.jit(lambda items: jax.lax.map(train, items))((falls, keys))
    return np.asarray(found, np.float64).reshape(len(RATES), task.seeds)


def distances(name: str, cases: list[tuple[float, float]], steps: int) -> np.ndarray:
    """Rms distance from the minimum of p^2 / 2 at the end, in units of `QUADRATIC_LR`.

    Cases are the noise of the gradient and whether the rate falls.
    """
    start, keys = jnp.linspace(0.9, 1.1, 64), random.split(random.key(0), steps)

    def train(case: jax.Array) -> jax.Array:
        noise, falls = case
        opt = optimizer(name, QUADRATIC_LR, falls, steps)
        return descend(opt, lambda p, key: p + noise * random.normal(key, p.shape), start, keys)

    p = jax.jit(lambda cases: jax.lax.map(train, cases))(jnp.array(cases))
    return np.sqrt(np.mean(np.asarray(p, np.float64) ** 2, axis=1)) / QUADRATIC_LR


def ways(name: str, pairs: list[tuple[float, float]]) -> np.ndarray:
    """Final parameters, starting from 0, for each b1 and b2: on falling gradients, and on noise."""
    noise = 0.1 + random.normal(random.key(0), (2000, 256))
    sizes = jnp.linspace(1, 2, 256)  # covers all positions between two codes of the norm

    def train(pair: jax.Array) -> list[jax.Array]:
        opt = adamaxw.adamax(1e-3, *pair, moment_dtype=FORMATS[name])
        falling = pair[1] ** jnp.arange(float(FALLING_STEPS))[:, None] * sizes
        return [descend(opt, lambda _, g: g, jnp.zeros(256), grads) for grads in (falling, noise)]

    found = jax.jit(lambda pairs: jax.lax.map(train, pairs))(jnp.array(pairs))
    return np.asarray(found, np.float64)


def _digits(x: float) -> float:
    return float(f"{x:.5g}")


def measure(scale: int = 1) -> dict[str, Any]:
    """All figures, with steps and seeds divided by `scale`."""
    found: dict[str, Any] = {"command": "python benchmarks/few_bits.py", "versions": versions()}
    rows = found["tasks"] = []
    for name, task in TASKS.items():
        begin = time.perf_counter()
        task = task._replace(steps=max(1, task.steps // scale), seeds=max(2, task.seeds // scale))
        ends = {fmt: losses(task, fmt) for fmt in FORMATS}
        for i, rate in enumerate(RATES):
            row = {fmt: list(map(_digits, end[i])) for fmt, end in ends.items()}
            rows.append({"task": name, "rate": rate, "losses": row})
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)

    cases = list(itertools.product((0.0, 0.01), RATES))
    numbers = [(noise, RATES[rate]) for noise, rate in cases]
    far = {fmt: distances(fmt, numbers, QUADRATIC_STEPS // scale) for fmt in FORMATS}
    found["quadratic"] = [
        {"noise": noise, "rate": rate, "distance": {fmt: _digits(x[i]) for fmt, x in far.items()}}
        for i, (noise, rate) in enumerate(cases)
    ]

    pairs = list(itertools.product(B1S, B2S))
    exact, *others = (ways(fmt, pairs) for fmt in FORMATS)
    rows = found["b2"] = [{"b1": b1, "b2": b2} for b1, b2 in pairs]
    for kind, ours in enumerate(exact):
        for fmt, theirs in zip(FEW, others, strict=True):
            parts = np.sum(theirs[kind] * ours, axis=1) / np.sum(ours**2, axis=1)
            for row, part in zip(rows, parts, strict=True):
                row |= {f"{KINDS[kind]}, {fmt}": _digits(part)}
    return found


def _factor(logarithm: float) -> str:
    x = math.exp(logarithm)
    return f"{x:.3f}" if x < 10 else f"{float(f'{x:.2g}'):,.0f}"


def tables(found: dict[str, Any]) -> str:
    """The tables of the documentation. Means are geometric: losses differ by orders."""
    tasks = []
    for row in found["tasks"]:
        exact, *others = (np.log(row["losses"][fmt]) for fmt in FORMATS)
        cells = [f"{math.exp(exact.mean()):.3g}", _factor(exact.std(ddof=1))]
        for change in (other - exact for other in others):
            error = change.std(ddof=1) / math.sqrt(len(change))
            low, middle, high = (_factor(change.mean() + k * error) for k in (-1, 0, 1))
            cells.append(f"{middle} ({low} to {high})")
        tasks.append([row["task"], row["rate"], *cells])
    quadratic = [
        [f"{row['noise']:g}", row["rate"], *(f"{row['distance'][fmt]:.2g}" for fmt in FORMATS)]
        for row in found["quadratic"]
    ]
    parts = [
        [f"{b1:g}", f"{b2:g}", *(f"{part:.3f}" for part in of_way)]
        for b1, b2, *of_way in (row.values() for row in found["b2"])
    ]
    heads = (
        ["task", "learning rate", "float32", "spread", *FEW],
        ["noise", "learning rate", *FORMATS],
        list(found["b2"][0]),
    )
    return "\n\n".join(
        "\n".join(table(head, rows))
        for head, rows in zip(heads, (tasks, quadratic, parts), strict=True)
    )


def with_tables(page: str, found: dict[str, Any]) -> str:
    """The text of a page, with the tables of the same heads replaced."""
    for new in tables(found).split("\n\n"):
        head = re.escape(new.partition("\n")[0])
        page, number = re.subn(f"{head}(\n\\|.*)+", lambda _, new=new: new, page)
        if number != 1:
            raise ValueError(f"{number} tables with the head {head} in {PAGE.name}")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Measures or reports, as the command line says."""
    parser = argparse.ArgumentParser(description="Measure where moments of few bits cost.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--markdown", action="store_true", help="print what was measured")
    which.add_argument("--quick", action="store_true", help="a few steps and seeds, not saved")
    args = parser.parse_args(argv)
    if args.markdown:
        print(tables(json.loads(RESULTS.read_text())))
        return
    found = measure(QUICK if args.quick else 1)
    if not args.quick:
        results.write(RESULTS, found)
        page = with_tables(PAGE.read_text(encoding="utf-8"), found)
        PAGE.write_text(page, encoding="utf-8")
    print(f"{found['versions']}\n\n{tables(found)}")


if __name__ == "__main__":
    main()
