"""Which grid stores moments best in 2 bytes: levels per octave, range and spacing of the ratio.

Trains one vector for 10,000 steps on gradients of several kinds, with a drift that training should
follow, without ever synchronising it with the float32 run on the same gradients. Each row changes
one property of the format that ships; a second table changes b1. Run it with

    python benchmarks/grid.py
"""

# A jitted method is overridden by one that is not.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from versions import versions

import adamaxw
from adamaxw import _bits, _formats

# The gradients of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from gradients import gradients

STEPS = 10_000
SIZE = 4096
EPS = 1e-8
KINDS = ("normal", "heavy-tailed", "sparse", "rare", "spikes")
PACKED = ("uint8", "bfloat16")


@dataclass(frozen=True)
class Defined(_formats.Logarithmic):
    """Decodes, applies the rule and encodes on the CPU too, where the shipped format differs."""

    def step(self, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        return _formats.Format.step(self, *arguments)


@dataclass(frozen=True)
class Power(Defined):
    """The format that ships with another spacing: ratios at (q / 127)^power."""

    power: float = 2.0

    def encode(self, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        with mock.patch.object(_bits, "signed_root", self._root):
            return super().encode(*arguments)

    def ratio(self, mu: jax.Array, nu: jax.Array, scale: Any, dtype: Any) -> jax.Array:
        """See `Format`."""
        del nu, scale
        q = mu.astype(dtype)
        return jnp.sign(q) * jnp.abs(q / 127) ** self.power * self.peak

    def _root(self, square: jax.Array, noise: Any) -> jax.Array:
        ratio = jnp.minimum(jnp.abs(square) / 127**2, 1.0)
        below = jnp.floor(127 * ratio ** (1 / self.power))
        low, high = (below / 127) ** self.power, ((below + 1) / 127) ** self.power
        chance = (noise.astype(jnp.float32) + 0.5) * 2.0**-16
        code = jnp.minimum(below + (chance * (high - low) < ratio - low), 127.0)
        return jnp.copysign(code, square)


@dataclass(frozen=True)
class ToNearest(Defined):
    """The format that ships, with rounding to nearest."""

    def encode(self, m: Any, u: Any, scale: Any, noise: Any) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        return super().encode(m, u, scale, jnp.full_like(noise, _bits.TO_NEAREST))


def formats() -> dict[str, _formats.Format]:
    """The formats by name; the first is the one that ships."""
    ships = _formats.Logarithmic()
    chosen: dict[str, _formats.Format] = {
        f"ships: {ships.levels} levels an octave, m/u up to {ships.peak}, squares": ships
    }
    for levels in (3, 4, 5, 7, 8):
        base = Defined() if levels == 3 else ships
        chosen[f"{levels} levels an octave"] = replace(base, levels=levels)
    for peak in (1.08, 1.5, 2.0):
        chosen[f"m/u up to {peak}"] = replace(ships, peak=peak)
    for power in (1.0, 1.5, 3.0):
        chosen[f"(q/127)^{power:g}"] = Power(power=power)
    chosen["rounded to the nearest"] = ToNearest()
    chosen["bfloat16"] = _formats.BFloat16()
    return chosen


def noisy_drift(kind: str) -> np.ndarray:
    """Gradients of a kind, of shape (STEPS, SIZE), with a mean of a tenth of their size."""
    if kind == "rare":
        rng = np.random.default_rng(0)
        g = np.zeros((STEPS, SIZE), np.float32)
        rows = rng.integers(0, STEPS // 2, SIZE)
        for again in (0, STEPS // 2):
            g[rows + again, np.arange(SIZE)] = rng.normal(size=SIZE)
        return g
    g = gradients(kind, STEPS, (SIZE,))
    drift = np.where(np.arange(SIZE) % 2, 0.1, -0.1).astype(np.float32)
    return np.clip(g + drift * (g != 0), -1e4, 1e4)


def train(fmt: _formats.Format, grads: Any, b1: float = 0.9) -> np.ndarray:
    """The final parameters, starting from zeros."""
    with mock.patch.object(_formats, "FORMATS", (fmt,)):
        opt = adamaxw.adamax(1e-3, b1, eps=EPS, moment_dtype=fmt.name)

    def step(carry: Any, g: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = opt.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.zeros(SIZE)
    (params, _), _ = jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads))(
        (params, opt.init(params)), grads
    )
    return np.asarray(params, np.float64)


def error(got: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the difference, relative to the movement of the float32 run."""
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def main() -> None:
    """Prints the table, in Markdown."""
    grads = {kind: jnp.asarray(noisy_drift(kind)) for kind in KINDS}
    exact = {kind: train(_formats.WIDE, grads[kind]) for kind in KINDS}
    print(f"Error of the params after {STEPS:,} steps, relative to their movement; eps {EPS:g}.")
    print(f"{SIZE} parameters; {versions()}\n")
    print("| format | norm within | largest norm |", " | ".join(KINDS), "|")
    print("|---" * (3 + len(KINDS)) + "|")
    for name, fmt in formats().items():
        within = top = ""
        if isinstance(fmt, _formats.Logarithmic):
            within = f"{100 * (2 ** (0.5 / fmt.levels) - 1):.1f}%"
            top = f"{EPS * 2 ** (255 / fmt.levels):.2g}"
        errors = (error(train(fmt, grads[kind]), exact[kind]) for kind in KINDS)
        cells = (name, within, top, *(f"{100 * x:.2f}%" for x in errors))
        print("|", " | ".join(cells), "|", flush=True)

    print("\n| b1 |", " | ".join(f"{kind}, {name}" for kind in KINDS[:3] for name in PACKED), "|")
    print("|---" * (1 + 3 * len(PACKED)) + "|")
    for b1 in (0.0, 0.9, 0.95, 0.99, 0.999):
        cells = [f"{b1:g}"]
        for kind in KINDS[:3]:
            wide = train(_formats.WIDE, grads[kind], b1)
            cells += [
                f"{100 * error(train(_formats.of_moment_dtype(name), grads[kind], b1), wide):.2f}%"
                for name in PACKED
            ]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
