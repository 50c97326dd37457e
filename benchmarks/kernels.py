"""The arithmetic of a step: nanoseconds per element of one leaf, on one core.

The leaf fits in the cache, so that memory does not matter and other load of the machine matters
little. Reports the least of many runs, minus a call that does nothing. `NOTES.md` quotes its
figures. Run it on one core:

    taskset -c 0 python benchmarks/kernels.py
    XLA_FLAGS=--xla_cpu_prefer_vector_width=512 taskset -c 0 python benchmarks/kernels.py
    taskset -c 0 python benchmarks/kernels.py --shape 85 85 3 3
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from versions import versions

from adamaxw import _formats, _noise, _rule

RUNS = 300


def loops(
    fmt: _formats.Format, shape: tuple[int, ...]
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions to time and their arguments, by name."""
    rng = np.random.default_rng(0)
    g, p = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    noise = jnp.full(shape, 1000, jnp.uint32)
    scale = fmt.rescale(jnp.float32(1e-8), jnp.float32(1e-8))
    mu, nu = fmt.encode(0.3 * g, jnp.abs(g) + 1e-3, scale, noise)
    count = jnp.int32(7)
    constants = _rule.Constants(_rule.DecayRate.of(0.9), _rule.DecayRate.of(0.999), 1e-8)

    def step(g: Any, mu: Any, nu: Any, p: Any, scale: Any, count: Any, what: str) -> Any:
        drawn = noise
        if what == "all":
            drawn, _ = _noise.draw(_noise.keys(jnp.uint32(0), count), _noise.indices(4)[3], shape)
        new_scale = None if scale is None else fmt.rescale(0.999 * scale, jnp.float32(1e-8))
        mu, nu = fmt.step(g, (mu, nu), (scale, new_scale), drawn, constants)
        ratio = fmt.ratio(mu, nu, new_scale, jnp.float32)
        rate = jnp.float32(1e-3) / _rule.bias_correction(constants.b1, count.astype(jnp.float32))
        return mu, nu, p + _rule.next_step(ratio, p, step_size=rate, decay_factor=1e-7)

    arguments = g, mu, nu, p, scale, count
    return {
        what: (jax.jit(functools.partial(step, what=what)), arguments)
        for what in ("all but the noise", "all")
    }


def least(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of the fastest of many calls, warm."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> None:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description="Time the loops of a step in the cache.")
    parser.add_argument("--shape", type=int, nargs="+", default=[65536])
    shape = tuple(parser.parse_args().shape)
    nothing = least(jax.jit(jnp.negative), jnp.zeros(16))
    print(f"ns per element of a leaf of shape {shape}; {versions()}\n")
    print("| moments | all but the noise | all |\n|---|---|---|")
    for fmt in _formats.FORMATS:
        seconds = [least(f, *args) - nothing for f, args in loops(fmt, shape).values()]
        cells = (f"{s / math.prod(shape) * 1e9:.2f}" for s in seconds)
        print(f"| {fmt.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
