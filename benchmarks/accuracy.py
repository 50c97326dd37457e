"""How far `adamaxw.adamaxw` and `optax.adamaxw` are from AdamaxW in float64.

Both train one vector in float32 on the same gradients, never synchronised with the exact run. Run
it with

    python benchmarks/accuracy.py
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from versions import versions

import adamaxw

# The oracle and the gradients of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from gradients import KINDS, gradients
from oracle import Oracle, rms_error

STEPS = 10_000
SIZE = 256
HYPERPARAMETERS = {"learning_rate": 1e-3, "weight_decay": 0.1}


def train(make: Callable[..., Any], params: jax.Array, grads: np.ndarray) -> Any:
    """The history of (updates, mu, nu) over all gradients, stacked along the first axis."""
    opt = make(**HYPERPARAMETERS)

    def step(carry: Any, g: jax.Array) -> Any:
        params, state = carry
        updates, state = opt.update(g, state, params)
        moments = (optax.tree.get(state, name) for name in ("mu", "nu"))
        return (optax.apply_updates(params, updates), state), (updates, *moments)

    return jax.jit(lambda p, g: jax.lax.scan(step, (p, opt.init(p)), g)[1])(params, grads)


def main() -> None:
    """Prints the errors of updates, mu and nu for every kind of gradient."""
    console = Console()
    table = Table("gradients", *(f"{x} {y}" for x in ("update", "mu", "nu") for y in ("optax", "")))
    for kind in KINDS:
        grads = gradients(kind, STEPS, (SIZE,))
        params = jnp.linspace(-1.0, 1.0, SIZE)
        oracle = Oracle(params, lr=HYPERPARAMETERS["learning_rate"], wd=0.1)
        update, _, m, u = oracle.run(grads)
        results = [train(make, params, grads) for make in (optax.adamaxw, adamaxw.adamaxw)]
        cells = [
            f"{rms_error(result[i], exact):.1e}"
            for i, exact in enumerate((update, m, u))
            for result in results
        ]
        table.add_row(kind, *cells)
    console.print(f"{STEPS} steps, relative rms error; the second of each pair is adamaxw's")
    console.print(table)
    console.print(versions())


if __name__ == "__main__":
    main()
