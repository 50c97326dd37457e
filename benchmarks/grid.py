"""Which grid stores moments best in 2 bytes: levels an octave, range and spacing of the ratio.

One vector is trained for 10,000 steps on gradients of several kinds, with a drift that training
should follow, and never synchronised with the float32 run on the same gradients. Each row changes
one thing in the format that ships; a second table changes b1. Run it with

    python benchmarks/grid.py
"""

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
from adamaxw import _formats
from adamaxw._rule import Constants, next_first_moment, shrink

# The gradients are those of the tests.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from gradients import gradients

STEPS = 10_000
SIZE = 4096
EPS = 1e-8
KINDS = ("normal", "heavy-tailed", "sparse", "rare", "spikes")
PACKED = ("uint8", "bfloat16")


@dataclass(frozen=True)
class Power(_formats.Logarithmic):
    """The format that ships with another spacing: ratios at (q / 127)^power."""

    power: float = 2.0

    def _compress(self, square: jax.Array, noise: Any) -> jax.Array:
        ratio = jnp.minimum(jnp.abs(square) / 127**2, 1.0)
        below = jnp.floor(127 * ratio ** (1 / self.power))
        low, high = (below / 127) ** self.power, ((below + 1) / 127) ** self.power
        chance = (noise.astype(jnp.float32) + 0.5) * 2.0**-16
        code = jnp.minimum(below + (chance * (high - low) < ratio - low), 127.0)
        return jnp.copysign(code, square).astype(jnp.int32)

    def _square(self, mu: jax.Array) -> jax.Array:
        q = mu.astype(jnp.float32)
        return jnp.sign(q) * jnp.abs(q / 127) ** self.power * 127**2


@dataclass(frozen=True)
class Even(_formats.Logarithmic):
    """Levels evenly spaced between powers of two: the code is then the float32 itself, shortened.

    Nothing needs a polynomial. The norm is right to `1 / (2 levels + 1)`, and decays by octaves.
    """

    def rescale(self, scale: jax.Array, eps: jax.Array) -> jax.Array | None:
        """See `Format`."""
        moved = scale * jnp.exp2(jnp.round(jnp.log2(eps / scale)))
        return jnp.where((scale > 0) & (moved > 0) & (moved < jnp.inf), moved, eps)

    def step(
        self,
        g: jax.Array,
        stored: tuple[jax.Array, jax.Array],
        scales: tuple[Any, Any],
        noise: Any,
        constants: Constants,
    ) -> tuple[jax.Array, jax.Array]:
        """See `Format`."""
        (mu, nu), (scale, new_scale), (b1, b2, eps) = stored, scales, constants
        fall = self.levels * jnp.round(jnp.log2(new_scale / shrink(b2, scale))).astype(jnp.int32)
        fallen = nu.astype(jnp.int32) - fall
        level = self._level(jnp.abs(g) + eps, new_scale)
        risen = jnp.minimum(jnp.maximum(level, jnp.maximum(fallen, 0)), 255)
        old = self._square(mu) * (self._power(nu.astype(jnp.int32)) * scale)
        unit = np.float32(127**2 / self.peak)
        largest = new_scale * self._power(jnp.int32(255))
        clipped = jnp.where(g > largest, largest, jnp.where(g < -largest, -largest, g))
        m = next_first_moment(clipped * unit, old, b1) / (self._power(risen) * new_scale)
        code = jnp.where(jnp.abs(g) < jnp.inf, self._compress(m, noise), -128)
        new_mu = jnp.where(mu == -128, mu, code.astype(jnp.int8))
        new_nu = jnp.clip(jnp.maximum(level, fallen), 0, 255).astype(nu.dtype)
        return new_mu, jnp.where(new_mu == -128, np.asarray(255, nu.dtype), new_nu)

    def _level(self, u: jax.Array, scale: Any) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(u / scale, jnp.int32) - np.int32(127 << 23)
        return jnp.round(bits.astype(jnp.float32) * (self.levels * 2.0**-23)).astype(jnp.int32)

    def _power(self, n: jax.Array) -> jax.Array:
        bits = n * np.int32(2**23 // self.levels) + np.int32(127 << 23)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)


@dataclass(frozen=True)
class ToNearest(_formats.Logarithmic):
    """The format that ships, without chance."""

    def _compress(self, square: jax.Array, noise: Any) -> jax.Array:
        return super()._compress(square, jnp.full_like(noise, _formats.TO_NEAREST))


def formats() -> dict[str, _formats.Format]:
    """What is compared, by name; the first is what ships."""
    ships = _formats.Logarithmic()
    chosen: dict[str, _formats.Format] = {
        f"ships: {ships.levels} levels an octave, m/u up to {ships.peak}, squares": ships
    }
    for levels in (3, 4, 5, 7, 8):
        chosen[f"{levels} levels an octave"] = replace(ships, levels=levels)
    for peak in (1.08, 1.5, 2.0):
        chosen[f"m/u up to {peak}"] = replace(ships, peak=peak)
    for power in (1.0, 1.5, 3.0):
        chosen[f"(q/127)^{power:g}"] = Power(power=power)
    chosen["even between powers of two"] = Even()
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
    """The parameters at the end, from zeros."""
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
    """Root mean square of the difference, relative to the way that the float32 run went."""
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def main() -> None:
    """Prints the table, in Markdown."""
    grads = {kind: jnp.asarray(noisy_drift(kind)) for kind in KINDS}
    exact = {kind: train(_formats.WIDE, grads[kind]) for kind in KINDS}
    print(f"Error of the params after {STEPS:,} steps, relative to their way; eps {EPS:g}.")
    print(f"{SIZE} parameters; {versions()}\n")
    print("| format | norm within | largest norm |", " | ".join(KINDS), "|")
    print("|---" * (3 + len(KINDS)) + "|")
    for name, fmt in formats().items():
        within = top = ""
        if isinstance(fmt, _formats.Logarithmic):
            even = isinstance(fmt, Even)
            within = 1 / (2 * fmt.levels + 1) if even else 2 ** (0.5 / fmt.levels) - 1
            within = f"{100 * within:.1f}%"
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
                f"{100 * error(train(_formats.named(name), grads[kind], b1), wide):.2f}%"
                for name in PACKED
            ]
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
