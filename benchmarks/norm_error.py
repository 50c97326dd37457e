"""The error of the stored infinity norm against the step: does it grow?

One vector takes 20,000 gradients, in each format and in the bfloat16 of `optax.adamaxw`. After
each step the stored norm is compared with the one of float64, and never set right. Run it with

    python benchmarks/norm_error.py     # prints the largest errors, draws docs/norm_error.png
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from versions import versions

import adamaxw

# The oracle and the gradients of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from gradients import gradients
from oracle import Oracle, octaves

STEPS = 20_000
SIZE = 256
KINDS = ("normal", "heavy-tailed", "sparse", "spikes", "tiny", "every scale")
PICTURE = Path(__file__).parents[1] / "docs" / "norm_error.png"


def norms(opt: Any, grads: Any, dtype: Any) -> np.ndarray:
    """The stored norm after each step, as float64 of shape (STEPS, SIZE)."""
    params = jnp.ones(SIZE, dtype)

    def step(state: Any, g: jax.Array) -> tuple[Any, Any]:
        _, state = opt.update(g.astype(dtype), state, params)
        if isinstance(state, adamaxw.AdamaxState):
            return state, adamaxw.moments.unpack(state).nu
        return state, optax.tree.get(state, "nu").astype(jnp.float32)

    _, history = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(opt.init(params), grads)
    return np.asarray(history, np.float64)


def largest_errors(kind: str) -> dict[str, np.ndarray]:
    """|log2(stored / exact)| after each step, the largest over elements, by format."""
    grads = np.clip(gradients(kind, STEPS, (SIZE,)), -6e4, 6e4)
    _, _, _, exact = Oracle(np.ones(SIZE), 0.0).run(grads)
    stored = {
        str(moment_dtype): norms(adamaxw.adamax(0.0, moment_dtype=moment_dtype), grads, jnp.float32)
        for moment_dtype in ("uint8", "bfloat16", None)
    }
    # With gradients rounded to bfloat16, what remains is the error of the state alone.
    coarse = grads.astype(jnp.bfloat16).astype(np.float64)
    _, _, _, exact_of_coarse = Oracle(np.ones(SIZE), 0.0).run(coarse)
    theirs = norms(optax.adamaxw(0.0), jnp.asarray(grads), jnp.bfloat16)
    errors = {name: octaves(got, exact).max(axis=1) for name, got in stored.items()}
    theirs = octaves(theirs, np.maximum(exact_of_coarse, 1e-30)).max(axis=1)
    return errors | {"optax.adamaxw, bfloat16": theirs}


def main() -> None:
    """Prints the largest errors, and plots errors against steps."""
    print(f"Largest |log2(stored norm / exact norm)| of {STEPS:,} steps; {versions()}\n")
    figure = Figure(figsize=(11, 6), layout="constrained")
    names = ("uint8", "bfloat16", "None", "optax.adamaxw, bfloat16")
    print("| gradients |", " | ".join(names), "|")
    print("|---" * (1 + len(names)) + "|")
    for kind, axes in zip(KINDS, figure.subplots(2, 3, sharex=True, sharey=True).flat, strict=True):
        errors = largest_errors(kind)
        print("|", " | ".join([kind, *(f"{errors[name].max():.2g}" for name in names)]), "|")
        for name in names:
            axes.loglog(np.arange(1, STEPS + 1), errors[name], lw=1, label=name)
        axes.axhline(1 / 12, color="black", lw=0.8, linestyle="--", label="1/12")
        axes.set(title=f"gradients: {kind}", ylim=(1e-8, 30), xlabel="step")
    figure.supylabel("largest error of the norm (octaves)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
