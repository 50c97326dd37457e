"""Times a step: alternating with the reference, in one process."""

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from contenders import Contender
from results import quartiles
from runners import Runner

# Least seconds of a sample. A shorter one would measure the clock and the scheduler, and on an
# accelerator the launch of a step, which training hides behind a queue.
_SHORTEST_ON_CPU, _SHORTEST = 2e-3, 5e-2
# For what a process holds besides arrays, and what the estimates miss.
SPARE = 2**30
_WARM_UP = 3


def available_memory() -> int:
    """Bytes that are still free for arrays, on the device of JAX."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def needs(contenders: Sequence[Contender], parameters: int, sets: int) -> int:
    """Rough bytes of memory with all contenders at once."""
    return SPARE + parameters * sum(c.bytes_per_parameter(sets) for c in contenders)


def sample(runner: Runner, index: int, repeats: int) -> float:
    """Seconds per step, over `repeats` steps and the wait for the last."""
    runner.prepare(index)
    begin = time.perf_counter()
    for _ in range(repeats):
        runner.step()
    runner.block()
    return (time.perf_counter() - begin) / repeats


def warm_up(runner: Runner) -> int:
    """Compiles, and returns how many steps fill a sample."""
    seconds = [sample(runner, i, 1) for i in range(_WARM_UP)]
    shortest = _SHORTEST_ON_CPU if jax.default_backend() == "cpu" else _SHORTEST
    return max(1, round(shortest / seconds[-1]))


def _rounds(seconds: float, budget: float, most: int) -> int:
    """As many rounds as fit the budget, but at least five, for quartiles."""
    return min(most, max(5, int(budget / seconds)))


def paired(reference: Runner, contender: Runner, budget: float, most: int) -> dict[str, Any]:
    """Alternates the two; each goes first in every other round.

    Args:
        reference: what the ratio is to; warm.
        contender: cold or warm.
        budget: seconds that the rounds may take, roughly.
        most: rounds at most.

    Returns:
        Quartiles of the ratio of the two in one round, and of the seconds of each; the bytes of the
        contender's state, and what the compiler says of its step.
    """
    runners = reference, contender
    repeats = min(warm_up(runner) for runner in runners)
    seconds: tuple[list[float], list[float]] = [], []
    once = repeats * sum(sample(runner, 0, repeats) for runner in runners)
    rounds = _rounds(once, budget, most)
    for i in range(rounds):
        for which in (0, 1) if i % 2 else (1, 0):
            seconds[which].append(sample(runners[which], i, repeats))
    return _figures(seconds) | _footprint(contender) | {"repeats": repeats, "mode": "paired"}


def in_turn(
    reference: Callable[[], Runner], contender: Callable[[], Runner], rounds: int
) -> dict[str, Any]:
    """Two blocks of each in turn, because the two do not fit in memory together.

    Args:
        reference: builds what the ratio is to.
        contender: builds the other.
        rounds: steps of a block.

    Returns:
        As of `paired`; the ratios are those of the steps at the same place in their blocks.
    """
    seconds: tuple[list[float], list[float]] = [], []
    footprint: dict[str, float] = {}
    repeats = 1
    for _ in range(2):
        for build, found in zip((reference, contender), seconds, strict=True):
            runner = build()
            repeats = warm_up(runner)
            found += [sample(runner, i, repeats) for i in range(rounds)]
            footprint = _footprint(runner)
            del runner
            gc.collect()
    return _figures(seconds) | footprint | {"repeats": repeats, "mode": "in turn"}


def _footprint(runner: Runner) -> dict[str, float]:
    return {"state_bytes": runner.state_bytes()} | runner.analysis()


def _figures(seconds: tuple[list[float], list[float]]) -> dict[str, Any]:
    ratios = [mine / others for others, mine in zip(*seconds, strict=True)]
    return {
        "ratio": quartiles(ratios),
        "seconds": quartiles(seconds[1]),
        "reference_seconds": quartiles(seconds[0]),
        "rounds": len(ratios),
    }


def copy_bandwidth(size: int) -> float:
    """Best bytes per second, read and written, for arrays of `size` bytes.

    The best of a negation in place (one buffer, donated) and one into another buffer.
    """
    best = 0.0
    for donated in ((0,), ()):
        negate = jax.jit(jnp.negative, donate_argnums=donated)
        array = jax.block_until_ready(jnp.ones(size // 4, jnp.float32))
        for _ in range(10):
            begin = time.perf_counter()
            array = jax.block_until_ready(negate(array))
            best = max(best, 2 * size / (time.perf_counter() - begin))
    return best
