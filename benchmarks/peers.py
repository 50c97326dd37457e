"""What other implementations of AdaMax compute, and how to get the same from `adamaxw`.

Compares each peer with the formulas that it might follow, in NumPy and float64, on gradients that
tell them apart. Results of PyTorch, Keras and pytorch_optimizer are in tests/fixtures/peers.npz,
made by the script beside it; Optax and ours are run. Run it with

    python benchmarks/peers.py
    python benchmarks/peers.py --markdown    # the rows of the table in docs/comparison.md
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from versions import versions

import adamaxw

# The switch to float64 of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from modes import x64

with np.load(Path(__file__).parents[1] / "tests" / "fixtures" / "peers.npz") as file:
    RUNS = dict(file)
LR, B1, B2, EPS, WD = (float(RUNS[name]) for name in ("lr", "b1", "b2", "eps", "wd"))
_RATES: dict[str, Any] = {"b1": B1, "b2": B2, "eps": EPS}


class Formula(NamedTuple):
    """One variant of AdaMax.

    Attributes:
        eps: where it stands: in the maximum, added to the norm, or nowhere.
        decay: what the weight decay times the parameter is added to: the gradient, the step before
            it is scaled by the learning rate, the step after that, or nothing.
        norm: of a complex gradient: its modulus, or one for each of its parts.
    """

    eps: str
    decay: str = "nowhere"
    norm: str = "modulus"

    def run(self, start: Any, grads: Any, eps: float = EPS) -> np.ndarray:
        """The parameters after each step."""
        if self.norm == "parts":
            real = self._replace(norm="modulus")
            parts = (
                real.run(*x, eps) for x in ((start.real, grads.real), (start.imag, grads.imag))
            )
            return next(parts) + 1j * next(parts)
        p, m, u = start, np.zeros_like(start), np.zeros(start.shape)
        history = []
        for t, gradient in enumerate(grads, start=1):
            g = gradient + WD * p if self.decay == "gradient" else gradient
            m = B1 * m + (1 - B1) * g
            u = np.maximum(B2 * u, np.abs(g) + (eps if self.eps == "in the maximum" else 0))
            with np.errstate(invalid="ignore"):
                step = m / (1 - B1**t) / (u + (eps if self.eps == "added to the norm" else 0))
            decay = {"step": LR * WD, "step after the rate": WD}.get(self.decay, 0.0)
            p = p - LR * step - decay * p
            history.append(p)
        return np.stack(history)


EPS_PLACES = ("in the maximum", "added to the norm", "nowhere")
DECAYS = ("gradient", "step", "step after the rate", "nowhere")


class Row(NamedTuple):
    """A peer and what it computes.

    Attributes:
        peer: its name.
        formula: the one it follows.
        off: how far its parameters are from those of the formula, at most.
        next_off: the same for the formula which is next to it.
        same: how to have the same with `adamaxw`; empty where there is no way.
        ours_off: how far that is from the peer.
    """

    peer: str
    formula: Formula
    off: float
    next_off: float
    same: str
    ours_off: float


def train(opt: Any, start: Any, grads: Any) -> np.ndarray:
    """The parameters after each step of a transformation, in float64."""
    with x64():
        params, state, history = jnp.asarray(start), opt.init(jnp.asarray(start)), []
        for g in grads:
            updates, state = opt.update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            history.append(np.asarray(params))
        return np.stack(history)


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference; inf where one is not finite."""
    return float(np.max(np.nan_to_num(np.abs(got - expected), nan=np.inf)))


def _same(formula: Formula) -> tuple[str, Callable[[], Any]] | None:
    """Our transformation that follows a formula, as code and as a function that makes it."""
    ways: dict[Formula, tuple[str, Callable[[], Any]]] = {
        Formula("in the maximum"): (
            "adamaxw.adamax(lr)",
            lambda: adamaxw.adamax(LR, **_RATES),
        ),
        Formula("in the maximum", norm="parts"): (
            "optax.contrib.split_real_and_imaginary(adamaxw.adamax(lr))",
            lambda: optax.contrib.split_real_and_imaginary(adamaxw.adamax(LR, **_RATES)),
        ),
        Formula("in the maximum", "gradient"): (
            "optax.chain(optax.add_decayed_weights(wd), adamaxw.adamax(lr))",
            lambda: optax.chain(optax.add_decayed_weights(WD), adamaxw.adamax(LR, **_RATES)),
        ),
        Formula("in the maximum", "step"): (
            "adamaxw.adamaxw(lr, weight_decay=wd)",
            lambda: adamaxw.adamaxw(LR, **_RATES, weight_decay=WD),
        ),
        Formula("in the maximum", "step after the rate"): (
            "adamaxw.adamaxw(lr, weight_decay=wd, scale_decay_by_lr=False)",
            lambda: adamaxw.adamaxw(LR, **_RATES, weight_decay=WD, scale_decay_by_lr=False),
        ),
    }
    return ways.get(formula)


def _problem(name: str) -> tuple[Any, Any]:
    """Initial parameters and gradients."""
    start, grads = RUNS["start"], RUNS["gradients"]
    if "complex" in name:
        return start + 1j * start[::-1], grads + 1j * grads[:, ::-1]
    return start, grads


_LIVE: dict[str, Callable[[], Any]] = {
    "optax.adamax": lambda: optax.adamax(LR, **_RATES),
    "optax.adamax, complex": lambda: optax.adamax(LR, **_RATES),
    "optax.adamaxw": lambda: optax.adamaxw(LR, **_RATES, weight_decay=WD),
}

_INSIDE, _ADDED = EPS_PLACES[:2]
FORMULAS = {
    "torch.optim.Adamax": Formula(_INSIDE),
    "torch.optim.Adamax, weight_decay": Formula(_INSIDE, "gradient"),
    "torch.optim.Adamax, complex": Formula(_INSIDE, norm="parts"),
    "keras.optimizers.Adamax": Formula(_ADDED),
    "keras.optimizers.Adamax, weight_decay": Formula(_ADDED, "step"),
    "pytorch_optimizer.AdaMax, weight_decay": Formula(_INSIDE, "gradient"),
    "pytorch_optimizer.AdaMax, weight_decouple": Formula(_INSIDE, "step"),
    "pytorch_optimizer.AdaMax, fixed_decay": Formula(_INSIDE, "step after the rate"),
    "optax.adamax": Formula(_INSIDE),
    "optax.adamax, complex": Formula(_INSIDE),
    "optax.adamaxw": Formula(_INSIDE, "step"),
}


def row(peer: str) -> Row:
    """Compares a peer of FORMULAS with all formulas."""
    start, grads = _problem(peer)
    history = train(_LIVE[peer](), start, grads) if peer in _LIVE else RUNS[peer]
    formula = FORMULAS[peer]
    decays = ("nowhere",) if formula.decay == "nowhere" else DECAYS
    norms = ("modulus", "parts") if "complex" in peer else ("modulus",)
    off = {
        candidate: distance(candidate.run(start, grads), history)
        for candidate in itertools.starmap(Formula, itertools.product(EPS_PLACES, decays, norms))
    }
    same = _same(formula)
    ours_off = np.inf if same is None else distance(train(same[1](), start, grads), history)
    others = (x for candidate, x in off.items() if candidate != formula)
    return Row(peer, formula, off[formula], min(others), same[0] if same else "", ours_off)


def rows() -> list[Row]:
    """All peers."""
    return [row(peer) for peer in FORMULAS]


def _figure(x: float) -> str:
    """Formats a difference; float64 round-off depends on the machine, so it is not resolved."""
    return "below 1e-12" if x < 1e-12 else f"{x:.1g}"


def _cells(row: Row) -> tuple[str, ...]:
    same = f"`{row.same}`" if row.same else "none, but see below"
    return (
        row.peer,
        row.formula.eps,
        "" if row.formula.decay == "nowhere" else row.formula.decay,
        row.formula.norm if "complex" in row.peer else "",
        _figure(row.off),
        _figure(row.next_off),
        same,
        _figure(row.ours_off) if row.same else "",
    )


def markdown() -> list[str]:
    """The rows as lines of a table in Markdown."""
    return [f"| {' | '.join(_cells(row))} |" for row in rows()]


def main() -> None:
    """Prints the table with the versions and the machine."""
    if "--markdown" in sys.argv:
        print(*markdown(), sep="\n")
        return
    table = Table(
        "peer", "eps", "decay added to", "complex norm", "off", "next formula off", "same", "off"
    )
    for each in rows():
        table.add_row(*_cells(each))
    console = Console()
    console.print(table)
    console.print(f"{RUNS['versions']}, {versions()}")


if __name__ == "__main__":
    main()
