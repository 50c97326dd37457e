"""A million small steps in every format and rounding, compared with float64: do errors grow?

One vector of parameters, never set right. Most elements take gradients of the kinds of the tests,
tilted towards one sign and then the other, 250,000 steps each: what a step gets wrong adds up. The
last ones follow a target that moves slowly, with noise: their gradients depend on the parameter,
and training corrects its errors. No step is larger than 1/35 of the smallest that a bfloat16 from 1
to 2 notices, rounded to the nearest. Beside the runs go two oracles of the tests: one trains by
itself, for the parameters, and one takes the gradients that each run has seen, for its moments. Run
it with

    python benchmarks/soak.py             # writes results/soak.json, prints the tables
    python benchmarks/soak.py --report    # prints the tables of what was measured
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import results
from markdown_table import table
from versions import versions

import adamaxw

# The oracle and the gradients of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from gradients import gradients
from modes import apply_updates
from oracle import Oracle, octaves

RESULTS = Path(__file__).parent / "results" / "soak.json"
STEPS = 1_000_000
# The other hyperparameters are the defaults of all.
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2
# How many elements there are of each kind of gradient.
LANES = 32
GIVEN = ("normal", "heavy-tailed", "sparse", "spikes", "tiny", "huge", "every scale")
KINDS = (*GIVEN, "feedback")
# Of means and targets.
PERIOD = 500_000
# Figures are of windows that end at these steps, and at the last one.
ENDS = (1_000, 10_000, 100_000, 900_000)
# Steps that are compared at a time, and steps whose gradients come from one seed.
BLOCK, SEEDED = 1_000, 10_000
# What the norm may be off by, in octaves: half a level, half a unit in the last place of bfloat16,
# and what float32 adds.
BOUNDS = {"uint8": 1 / 12 + 1e-4, "bfloat16": math.log2(1 + 2**-8) + 1e-4, "None": 1e-4}


class Contender(NamedTuple):
    """An optimizer, the dtype of the parameters, and the bound of the norm, if it has one."""

    opt: Any
    dtype: str
    bound: float


def contenders() -> dict[str, Contender]:
    """Every combination of ours, by name, and Optax's."""
    chosen = {}
    for rounding, (moment_dtype, bound) in product(
        (None, "exact", "stochastic", "nearest"), BOUNDS.items()
    ):
        opt = adamaxw.adamaxw(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            moment_dtype=None if moment_dtype == "None" else moment_dtype,
            param_rounding=rounding or "nearest",
        )
        params = f"bfloat16 {rounding}" if rounding else "float32"
        chosen[f"{params}, moments {moment_dtype}"] = Contender(opt, params.split()[0], bound)
    opt = optax.adamaxw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    return chosen | {"optax.adamaxw, float32": Contender(opt, "float32", math.inf)}


class Problem(NamedTuple):
    """Gradients `slope (p - target) + given`, of all kinds side by side.

    Attributes:
        start: parameters, numbers of bfloat16.
        slope: 0 but for "feedback".
    """

    start: np.ndarray
    slope: np.ndarray

    @classmethod
    def new(cls) -> "Problem":
        """Parameters from 1 to 2, and slopes over six decades."""
        rng = np.random.default_rng(0)
        start = rng.uniform(1, 2, size=len(KINDS) * LANES).astype(jnp.bfloat16)
        slope = np.zeros(start.shape)
        slope[-LANES:] = 10 ** rng.uniform(-3, 3, size=LANES)
        return cls(start.astype(np.float32), slope.astype(np.float32))

    def gradient(self, p: Any, given: Any, target: Any) -> Any:
        """The gradient of float32 or float64 parameters."""
        return self.slope.astype(p.dtype) * (p - target) + given

    def blocks(self, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """`given` and `target` of BLOCK steps at a time, float32."""
        feedback = self.slope != 0
        for first in range(0, steps, SEEDED):
            number = min(SEEDED, steps - first)
            columns = [
                gradients(kind, number, (LANES,), seed=first + i)
                for i, kind in enumerate((*GIVEN, "normal"))
            ]
            # Within what uint8 holds, also when tilted.
            g = np.clip(np.concatenate(columns, axis=1), -4e4, 4e4)
            turns = (first + np.arange(number))[:, None] / PERIOD
            wave = np.sin(2 * np.pi * (turns + np.arange(g.shape[1]) / LANES))
            given = np.where(feedback, self.slope * g, g + 0.3 * wave * np.abs(g))
            # Parameters of all dtypes get the same numbers.
            given = given.astype(jnp.bfloat16).astype(np.float32)
            target = np.where(feedback, 1.5 + 0.5 * wave, 0).astype(np.float32)
            yield from zip(*(np.split(x, number // BLOCK) for x in (given, target)), strict=True)


def moments_of(state: Any) -> tuple[Any, Any, Any]:
    """The count and the two moments."""
    if isinstance(state, adamaxw.AdamaxState):
        return adamaxw.moments.unpack(state)[:3]
    return tuple(optax.tree.get(state, name) for name in ("count", "mu", "nu"))


def stepper(contender: Contender, problem: Problem) -> Callable[[Any, Any], Any]:
    """Compiled code for a block of steps from `(params, state)`.

    It returns those after it, and of each step: parameters (the master weights if there are some),
    the gradients that the run has seen, and the two moments.
    """
    opt = contender.opt

    def step(carry: Any, item: Any) -> Any:
        params, state = carry
        g = problem.gradient(params.astype(jnp.float32), *item).astype(params.dtype)
        updates, state = opt.update(g, state, params)
        params = apply_updates(params, updates)
        _, m, u = moments_of(state)
        value = params
        if isinstance(state, adamaxw.AdamaxState):
            value = adamaxw.moments.master_params(params, state)
        return (params, state), jax.tree.map(lambda x: x.astype(jnp.float32), (value, g, m, u))

    return jax.jit(lambda carry, items: jax.lax.scan(step, carry, items), donate_argnums=0)


class Walk:
    """The random walk of stochastic rounding, to be expected from the exact steps.

    A step of a part f of the unit in the last place is rounded with the variance f (1 - f) units^2.
    The decay and the feedback of the gradient shrink what has come together.
    """

    def __init__(self, slope: np.ndarray) -> None:
        self.slope = slope.astype(np.float64)
        self.variance = np.zeros(slope.shape)

    def step(self, update: np.ndarray, oracle: Oracle) -> np.ndarray:
        """Takes an update of the oracle; returns the variance of its parameters."""
        unit = np.ldexp(1.0, np.frexp(oracle.p)[1] - 8)
        part = np.abs(update) / unit % 1
        kept = 1 - LEARNING_RATE * (self.slope / oracle.u + WEIGHT_DECAY)
        self.variance = kept**2 * self.variance + part * (1 - part) * unit**2
        return self.variance


class Errors:
    """Largest values and sums of squares, of shape (windows, contenders, KINDS)."""

    def __init__(self, steps: int, number: int) -> None:
        self.ends = (*(end for end in ENDS if end < steps), steps)
        shape = len(self.ends), number, len(KINDS)
        self.largest = {key: np.zeros(shape) for key in ("norm", "moment", "param")}
        keys = ("moment_rms", "param_rms", "walk", "moved", "way")
        self.sums = {key: np.zeros(shape) for key in keys}

    def add(self, step: int, seen: tuple[Any, ...], exact: tuple[Any, ...], walk: Any) -> None:
        """Compares a block of steps.

        Args:
            step: the first of them.
            seen: how far parameters have come, and the moments, of shape (steps, contenders, size).
            exact: the same in float64; the parameters are those of one contender.
            walk: what `Walk` returns, of the shape of those.
        """
        window = next(i for i, end in enumerate(self.ends) if step < end)
        (p, m, u), (exact_p, exact_m, exact_u) = seen, exact
        moment = (m - exact_m) / exact_u
        largest = {
            "norm": octaves(u, exact_u),
            "moment": np.abs(moment),
            "param": np.abs(p - exact_p),
        }
        sums = {
            "moment_rms": moment**2,
            "param_rms": (p - exact_p) ** 2,
            "walk": walk,
            "moved": exact_p**2,
            "way": p * exact_p,
        }
        for key, x in largest.items():
            total = self.largest[key][window]
            np.maximum(total, _by_kind(x).max(axis=(0, 3)), out=total)
        for key, x in sums.items():
            self.sums[key][window] += _by_kind(x).sum(axis=(0, 3))

    def rows(self, names: list[str]) -> list[dict[str, Any]]:
        """The figures of each contender and kind; lists are of windows, the others of all steps.

        `norm`, `moment` and `param` are the largest errors: of the norm in octaves, of the first
        moment in units of the norm, and of the parameter. `walk` is the `param_rms` to expect from
        stochastic rounding, `moved` how far float64 has moved (rms), and `way` what part of that
        the contender has: 1 if its errors are not correlated with it.
        """
        moved, way = (self.sums[key].sum(axis=0) for key in ("moved", "way"))
        numbers = LANES * np.diff(self.ends, prepend=0)[:, None, None]
        once = {"moved": np.sqrt(moved / numbers.sum()), "way": way / moved}
        rms = {
            key: np.sqrt(self.sums[key] / numbers) for key in ("moment_rms", "param_rms", "walk")
        }
        return [
            {"contender": name, "kind": kind}
            | {key: _digits(x[c, k]) for key, x in once.items()}
            | {key: [_digits(y) for y in x[:, c, k]] for key, x in (self.largest | rms).items()}
            for (c, name), (k, kind) in product(enumerate(names), enumerate(KINDS))
        ]


def _by_kind(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:2], len(KINDS), LANES)


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def soak(chosen: dict[str, Contender], steps: int = STEPS, count: int = 0) -> dict[str, Any]:
    """Trains and compares.

    Args:
        chosen: what trains, by name.
        steps: how many, a multiple of BLOCK.
        count: updates that the states say were done before.

    Returns:
        "largest_step" of float64; "ends" of the windows; "counts" at the end, by name, and the
        "count" that they should be; "rows" of figures, see `Errors.rows`.

    Raises:
        ValueError: it is no multiple.
    """
    if steps % BLOCK:
        raise ValueError(f"steps must be a multiple of {BLOCK}, got {steps}")
    problem = Problem.new()
    size, names = len(problem.start), list(chosen)
    steppers = {name: stepper(contender, problem) for name, contender in chosen.items()}
    carries = {}
    for name, contender in chosen.items():
        params = jnp.asarray(problem.start, contender.dtype)
        state = contender.opt.init(params)
        if count:
            state = state._replace(count=jnp.asarray(count, jnp.int32))
        carries[name] = params, state
    own = Oracle(problem.start, LEARNING_RATE, wd=WEIGHT_DECAY)
    of_seen = Oracle(np.zeros((len(names), size)), lr=0.0, wd=0.0)
    own.t = of_seen.t = count
    walk, errors = Walk(problem.slope), Errors(steps, len(names))
    largest_step = 0.0
    for block, (given, target) in enumerate(problem.blocks(steps)):
        exact, walks = np.empty((2, len(given), 1, size))
        for t, item in enumerate(zip(given, target, strict=True)):
            update = own.step(problem.gradient(own.p, *item))
            exact[t], walks[t] = own.p - problem.start, walk.step(update, own)
            largest_step = max(largest_step, np.max(np.abs(update)))
        histories = []
        for name in names:
            carries[name], history = steppers[name](carries[name], (given, target))
            histories.append(history)
        p, g, m, u = (np.stack(column, axis=1) for column in zip(*histories, strict=True))
        _, _, exact_m, exact_u = of_seen.run(g)
        way = p - problem.start.astype(np.float64)
        errors.add(block * BLOCK, (way, m, u), (exact, exact_m, exact_u), walks)
    return {
        "largest_step": _digits(largest_step),
        "ends": list(errors.ends),
        "count": min(count + steps, 2**31 - 1),
        "counts": {name: int(moments_of(state)[0]) for name, (_, state) in carries.items()},
        "rows": errors.rows(names),
    }


def violations(found: dict[str, Any], bounds: dict[str, float]) -> list[str]:
    """What is not as documented: a norm beyond its bound, a wrong count, what is not finite."""
    wrong = [
        f"{name}: count {count}, expected {found['count']}"
        for name, count in found["counts"].items()
        if count != found["count"]
    ]
    for row in found["rows"]:
        name, kind = row["contender"], row["kind"]
        # NaN is the largest, and beyond every bound.
        norm = np.max(row["norm"])
        if not norm <= bounds[name]:
            wrong.append(f"{name}, {kind}: norm off by {norm} octaves")
        if not np.all(np.isfinite([*row["norm"], *row["moment"], *row["param"]])):
            wrong.append(f"{name}, {kind}: not finite")
    return wrong


def tables(found: dict[str, Any]) -> str:
    """Markdown: norm and first moment by format, parameters by contender; of the worst kind."""
    ends = [f"to {end:,}" for end in found["ends"]]
    formats: dict[str, list[Any]] = {}
    runs: dict[str, list[Any]] = {}
    for row in found["rows"]:
        formats.setdefault(row["contender"].rpartition("moments ")[2], []).append(row)
        runs.setdefault(row["contender"], []).append(row)
    norm, moment = [], []
    for name, rows in formats.items():
        norm.append([name, *(f"{x:.4g}" for x in _worst(rows, "norm"))])
        both = zip(_worst(rows, "moment"), _worst(rows, "moment_rms"), strict=True)
        moment.append([name, *(f"{largest:.2g} ({rms:.2g})" for largest, rms in both)])

    def line(name: str, rows: list[Any], key: str, largest: str, way: str) -> list[str]:
        of_way = [row | {key: [x / row["moved"] for x in row[key]]} for row in rows]
        errors = *_worst(of_way[:-1], key), _worst(of_way[-1:], key)[-1]
        # Two digits, without an exponent for hundreds.
        *given, feedback = (f"{float(f'{100 * x:.2g}'):g}%" for x in errors)
        return [name, *given, largest, way, feedback]

    param = []
    for name, rows in runs.items():
        largest = max(_worst(rows[:-1], "param"))
        ways = [row["way"] for row in rows[:-1]]
        way = f"{min(ways):.4f} to {max(ways):.4f}"
        param.append(line(name, rows, "param_rms", f"{largest:.2g}", way))
    first = next(iter(runs.values()))
    param.append(line("random walk to expect of stochastic", first, "walk", "", ""))
    return "\n\n".join(
        [
            "The norm: largest error, in octaves.",
            _lines(["moments", *ends], norm),
            "The first moment: largest error (and rms), in units of the norm.",
            _lines(["moments", *ends], moment),
            "The parameters: rms error, in percent of the way that float64 went.",
            _lines(["parameters", *ends, "largest", "part of the way", "feedback"], param),
        ]
    )


def _lines(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(table(columns, rows))


def _worst(rows: list[dict[str, Any]], key: str) -> list[float]:
    """The largest of each window."""
    return list(np.max([row[key] for row in rows], axis=0))


def main() -> None:
    """Measures or reports, as the command line says."""
    parser = argparse.ArgumentParser(description="A million steps beside float64.")
    parser.add_argument("--report", action="store_true", help="print what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to read or write")
    args = parser.parse_args()
    chosen = contenders()
    if not args.report:
        found = {
            "command": "python benchmarks/soak.py",
            "versions": versions(),
            "machine": results.machine(),
        }
        found |= soak(chosen)
        results.write(args.results, found)
    found = json.loads(args.results.read_text())
    print(f"{found['versions']}\n\n{tables(found)}")
    wrong = violations(found, {name: contender.bound for name, contender in chosen.items()})
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
