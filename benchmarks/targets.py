"""Targets for a step compiled for accelerators, and known shortfalls with their causes.

The rows that are compiled are defined here too, since targets refer to them.
"""

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple

LEAF = "leaf"
REFERENCE = "optax float32"


class Row(NamedTuple):
    """Dtype of the parameters, moments and rounding of AdamaxW; without moments, Optax's own."""

    dtype: str
    moments: str | None = None
    rounding: str = "nearest"

    @property
    def name(self) -> str:
        """As on the page."""
        if self.moments is None:
            return f"optax {self.dtype}"
        words = f", {self.rounding}" if self.dtype == "bfloat16" else ""
        return f"{self.dtype}, {self.moments}{words}"

    def optimizer(self) -> Any:
        """What is compiled."""
        import optax

        import adamaxw

        if self.moments is None:
            return optax.adamaxw(1e-3)
        moments = None if self.moments == "float32" else self.moments
        return adamaxw.adamaxw(1e-3, moment_dtype=moments, param_rounding=self.rounding)


_MOMENTS = ("float32", "bfloat16", "uint8")
ROWS = {
    row.name: row
    for row in (
        Row("float32"),
        Row("bfloat16"),
        *(Row("float32", moments) for moments in _MOMENTS),
        *(
            Row("bfloat16", moments, rounding)
            for rounding in ("nearest", "stochastic", "exact")
            for moments in _MOMENTS
        ),
    )
}
OURS = tuple(name for name, row in ROWS.items() if row.moments)
EXACT = tuple(name for name in OURS if ROWS[name].rounding == "exact")
PLAIN = tuple(name for name in OURS if name not in EXACT)


class Target(NamedTuple):
    """An upper bound of one figure.

    Attributes:
        figure: a key of a result, or one of `RELATIVE`.
        bound: the largest value that meets the target.
        rows: names of the rows it applies to.
        chips: names of the chips it applies to.
        trees: names of the trees it applies to.
        words: the name of the figure on the page.
    """

    figure: str
    bound: float
    rows: tuple[str, ...]
    chips: tuple[str, ...]
    trees: tuple[str, ...]
    words: str


# What a figure is divided by: another figure of the same row, or the same of Optax's float32 step.
RELATIVE = {
    "bytes / least": ("bytes", "least"),
    "cycles / Optax": ("cycles", REFERENCE),
    "seconds / Optax": ("seconds", REFERENCE),
}

_BOTH = (LEAF, "gpt2-small")
_TPU, _ALL = ("v5e", "v6e", "v5p"), ("v5e", "v6e", "v5p", "H100", "B200")
_CYCLES, _SLOW = "cycles, relative to Optax's float32 step", "processor seconds to compile"
_FEW = tuple(name for name in PLAIN if ROWS[name].moments == "uint8")


def _bfloat16(moments: str) -> tuple[str, ...]:
    return tuple(n for n in PLAIN if ROWS[n].dtype == "bfloat16" and ROWS[n].moments == moments)


TARGETS = (
    Target("kernels", 1, PLAIN, _ALL, _BOTH, "kernels per leaf"),
    Target("bytes / least", 1, PLAIN, _ALL, _BOTH, "bytes, relative to the least"),
    Target("bytes / least", 1.3, EXACT, _ALL, _BOTH, "bytes, relative to the least"),
    Target("temporaries", 0.05, OURS, _ALL, _BOTH, "temporaries, bytes per parameter"),
    Target("cycles / Optax", 0.75, ("float32, bfloat16",), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.66, ("float32, uint8",), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.66, _bfloat16("bfloat16"), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.66, _bfloat16("uint8"), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 1.0, EXACT[:1], _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.8, EXACT[1:], _TPU, _BOTH, _CYCLES),
    Target("instructions", 115, _FEW[:2], ("H100",), (LEAF,), "instructions per element"),
    Target("instructions", 125, _FEW[2:], ("H100",), (LEAF,), "instructions per element"),
    Target(
        "seconds / Optax",
        4,
        ("float32, bfloat16", "float32, uint8"),
        ("CPU", "v5e", "H100"),
        ("gpt2-small",),
        "processor seconds to compile, relative to Optax",
    ),
    Target("seconds", 120, ("float32, bfloat16",), ("H100",), ("nvae-cifar10",), _SLOW),
    Target("seconds", 240, ("float32, uint8",), ("H100",), ("nvae-cifar10",), _SLOW),
)


class Shortfall(NamedTuple):
    """Where a target is missed, by how much at most, and why. Patterns as in `fnmatch`."""

    figure: str
    row: str
    chip: str
    tree: str
    bound: float
    cause: str


_PRIORITY = (
    "the time grows with the number of operations per leaf; observed once: XLA's priority fusion "
    "takes nearly half of it"
)
SHORTFALLS: tuple[Shortfall, ...] = (
    Shortfall("seconds / Optax", "float32, bfloat16", "H100", "gpt2-small", 5, _PRIORITY),
    Shortfall("seconds / Optax", "float32, uint8", "H100", "gpt2-small", 8, _PRIORITY),
    Shortfall(
        "seconds",
        "float32, bfloat16",
        "H100",
        "nvae-cifar10",
        165,
        "the time grows with the number of operations per leaf; not profiled",
    ),
    Shortfall(
        "seconds / Optax",
        "float32, uint8",
        "v5e",
        "gpt2-small",
        8,
        "observed once: libtpu schedules a kernel with uint8 arrays as one block of larger tiles, "
        "and takes several times as long as for Optax even if the codes pass through unchanged",
    ),
    Shortfall(
        "seconds / Optax",
        "float32, uint8",
        "CPU",
        "gpt2-small",
        8,
        "LLVM optimizes three loops per shape, one of them with the noise and two powers of two",
    ),
    Shortfall(
        "cycles / Optax",
        "*uint8*",
        "v6e",
        "gpt2-small",
        0.73,
        "the estimate charges arithmetic above memory there; one leaf meets the target",
    ),
)

# For rounding in the results, and for scalars besides the leaf.
_TOLERANCE = 1.005


class Finding(NamedTuple):
    """A figure, its target, and the known shortfall that covers it, if any."""

    target: Target
    row: str
    chip: str
    tree: str
    value: float
    shortfall: Shortfall | None

    @property
    def met(self) -> bool:
        """Whether the figure is within the target."""
        return self.value <= self.target.bound * _TOLERANCE

    @property
    def held(self) -> bool:
        """Whether the target is met, or missed by no more than a known shortfall."""
        allowed = self.shortfall.bound if self.shortfall else self.target.bound
        return self.met or self.value <= allowed * _TOLERANCE

    def refusal(self) -> str:
        """The message of a check that fails."""
        allowed = self.shortfall.bound if self.shortfall else self.target.bound
        return (
            f"{self.row}, {self.chip}, {self.tree}: {self.target.words}: {self.value:.3g}, "
            f"at most {allowed:g} allowed"
        )


def value(figure: str, row: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """A figure of a result; None if a part of it is missing."""
    key, divisor = RELATIVE.get(figure, (figure, None))
    if divisor is None:
        return row.get(key)
    below = reference.get(key) if divisor == REFERENCE else row.get(divisor)
    return row[key] / below if below and key in row else None


def findings(rows: Iterable[dict[str, Any]]) -> list[Finding]:
    """Pairs each target with each result that it applies to."""
    by_name = {(row["tree"], row["chip"], row["row"]): row for row in rows}
    found = []
    for target in TARGETS:
        for (tree, chip, name), row in by_name.items():
            if tree in target.trees and chip in target.chips and name in target.rows:
                figure = value(target.figure, row, by_name.get((tree, chip, REFERENCE), {}))
                if figure is not None:
                    key = (target.figure, name, chip, tree)
                    shortfall = next((s for s in SHORTFALLS if _covers(s, key)), None)
                    found.append(Finding(target, name, chip, tree, figure, shortfall))
    return found


def _covers(shortfall: Shortfall, key: tuple[str, ...]) -> bool:
    return all(map(fnmatch.fnmatchcase, key, shortfall[:4]))
