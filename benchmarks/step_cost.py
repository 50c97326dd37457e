"""What a step costs in each format and rounding: time beside `optax.adamaxw`, and bytes.

One leaf of 8 million parameters; the update and its application compiled together, buffers
donated. All are run in turn, round after round, and the median of the ratios to the run of
`optax.adamaxw` in the same round counts: the machine's other load falls on all. Run it with

    python benchmarks/step_cost.py
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from versions import versions

import adamaxw

SHAPE = (8_000, 1_000)
ROUNDS = 40


def step_of(opt: Any) -> Callable[..., Any]:
    """Update and apply, jitted, params and state donated."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(dtype: str, optimizers: dict[str, Any]) -> list[str]:
    """Lines of a table; the first optimizer is the one beside which the others are timed."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=SHAPE), dtype) for _ in range(2)]
    start = jnp.asarray(rng.normal(size=SHAPE), dtype)
    steps, runs, temporaries = {}, {}, {}
    for name, opt in optimizers.items():
        steps[name] = step_of(opt)
        runs[name] = start + 0, opt.init(start)
        analysis = steps[name].lower(*runs[name], grads[0]).compile().memory_analysis()
        temporaries[name] = analysis.temp_size_in_bytes / start.size
    seconds = {name: [] for name in optimizers}
    for i in range(ROUNDS):
        for name, step in steps.items():
            begin = time.perf_counter()
            runs[name] = jax.block_until_ready(step(*runs[name], grads[i % 2]))
            seconds[name].append(time.perf_counter() - begin)
    reference = np.array(next(iter(seconds.values())))[2:]
    lines = []
    for name, times in seconds.items():
        ratio = np.median(np.array(times)[2:] / reference)
        state = sum(x.nbytes for x in jax.tree.leaves(runs[name][1]) if x.ndim) / start.size
        cells = (dtype, name, f"{ratio:.2f}", f"{state:.2f}", f"{temporaries[name]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Prints the table, in Markdown."""
    print(f"{SHAPE[0] * SHAPE[1]:,} parameters in one leaf; {versions()}\n")
    print("| params and gradients | optimizer | time | state, bytes | temporary, bytes |")
    print("|---|---|---|---|---|")
    for dtype, roundings in (("float32", ["nearest"]), ("bfloat16", ["nearest", "stochastic"])):
        optimizers: dict[str, Any] = {"optax.adamaxw": optax.adamaxw(1e-3)}
        if dtype == "bfloat16":
            roundings = [*roundings, "exact"]
        for moment_dtype in (None, "bfloat16", "uint8"):
            for rounding in roundings:
                name = f"moments {moment_dtype}"
                name += f", {rounding}" if dtype == "bfloat16" else ""
                optimizers[name] = adamaxw.adamaxw(
                    1e-3, moment_dtype=moment_dtype, param_rounding=rounding
                )
        print(*measure(dtype, optimizers), sep="\n", flush=True)


if __name__ == "__main__":
    main()
