"""What a step compiled for an accelerator shall be, in one table, and where it is not.

The rows that are compiled stand here too, for they are what targets are of.
"""

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple

LEAF = "leaf"
REFERENCE = "optax float32"


class Row(NamedTuple):
    """Parameters, moments and rounding of AdamaxW; without moments Optax's own, in their dtype."""

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
        bound: the largest value that holds.
        rows: which rows it is for.
        chips: which chips, as a pattern; "v*" are the TPUs.
        trees: which trees.
        words: what the figure is, on the page.
    """

    figure: str
    bound: float
    rows: tuple[str, ...]
    chips: tuple[str, ...]
    trees: tuple[str, ...]
    words: str


# Of a figure, what it is divided by: another of the same row, or the same of Optax's float32 step.
RELATIVE = {
    "bytes / least": ("bytes", "least"),
    "cycles / Optax": ("cycles", REFERENCE),
    "seconds / Optax": ("seconds", REFERENCE),
}

_BOTH = (LEAF, "gpt2-small")
_TPU, _ALL = ("v5e", "v6e", "v5p"), ("v5e", "v6e", "v5p", "H100", "B200")
_CYCLES, _SLOW = "cycles, Optax's float32 step = 1", "processor seconds to compile"
_FEW = tuple(name for name in PLAIN if ROWS[name].moments == "uint8")


def _bfloat16(moments: str) -> tuple[str, ...]:
    return tuple(n for n in PLAIN if ROWS[n].dtype == "bfloat16" and ROWS[n].moments == moments)


TARGETS = (
    Target("kernels", 1, PLAIN, _ALL, _BOTH, "kernels a leaf"),
    Target("bytes / least", 1, PLAIN, _ALL, _BOTH, "bytes, the least = 1"),
    Target("bytes / least", 1.3, EXACT, _ALL, _BOTH, "bytes, the least = 1"),
    Target("temporaries", 0.05, OURS, _ALL, _BOTH, "temporaries, bytes a parameter"),
    Target("cycles / Optax", 0.75, ("float32, bfloat16",), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.66, ("float32, uint8",), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.66, _bfloat16("bfloat16"), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.66, _bfloat16("uint8"), _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 1.0, EXACT[:1], _TPU, _BOTH, _CYCLES),
    Target("cycles / Optax", 0.8, EXACT[1:], _TPU, _BOTH, _CYCLES),
    Target("instructions", 115, _FEW[:2], ("H100",), (LEAF,), "instructions an element"),
    Target("instructions", 125, _FEW[2:], ("H100",), (LEAF,), "instructions an element"),
    Target(
        "seconds / Optax",
        4,
        ("float32, bfloat16", "float32, uint8"),
        ("CPU", "v5e", "H100"),
        ("gpt2-small",),
        "processor seconds to compile, Optax = 1",
    ),
    Target("seconds", 120, ("float32, bfloat16",), ("H100",), ("nvae-cifar10",), _SLOW),
    Target("seconds", 240, ("float32, uint8",), ("H100",), ("nvae-cifar10",), _SLOW),
)


class Shortfall(NamedTuple):
    """Where a target is missed, by how much at most, and why. Patterns are those of `fnmatch`."""

    figure: str
    row: str
    chip: str
    tree: str
    bound: float
    cause: str


_PRIORITY = (
    "nearly half of it is XLA's priority fusion, whose time grows with the operations of a leaf: "
    "some 60 with bfloat16 moments and 75 with uint8, where Optax has 13"
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
        "124 to 144 s in three runs; not profiled. It grows with the operations of a leaf: Optax "
        "and float32 moments take 27 s",
    ),
    Shortfall(
        "seconds / Optax",
        "float32, uint8",
        "v5e",
        "gpt2-small",
        8,
        "libtpu lays kernels with bytes out in tiles of four float32 ones, and schedules them as "
        "one block: one that passes codes through unchanged takes 3.6 times as long as Optax's",
    ),
    Shortfall(
        "seconds / Optax",
        "float32, uint8",
        "CPU",
        "gpt2-small",
        8,
        "for each shape LLVM optimizes three loops, with the noise and two powers in one of them",
    ),
    Shortfall(
        "cycles / Optax",
        "*uint8*",
        "v6e",
        "gpt2-small",
        0.73,
        "arithmetic is priced above the bytes there; one leaf holds the target",
    ),
)

# What rounds away in the results, and scalars beside a leaf.
_TOLERANCE = 1.005


class Finding(NamedTuple):
    """A figure beside its target, and beside the shortfall that covers it, if any."""

    target: Target
    row: str
    chip: str
    tree: str
    value: float
    shortfall: Shortfall | None

    @property
    def met(self) -> bool:
        """Whether the target is."""
        return self.value <= self.target.bound * _TOLERANCE

    @property
    def held(self) -> bool:
        """Whether the target is met, or missed by no more than the shortfall says."""
        allowed = self.shortfall.bound if self.shortfall else self.target.bound
        return self.met or self.value <= allowed * _TOLERANCE

    def refusal(self) -> str:
        """The message of a check that fails."""
        allowed = self.shortfall.bound if self.shortfall else self.target.bound
        return (
            f"{self.row}, on {self.chip}, {self.tree}: {self.target.words}: {self.value:.3g}, "
            f"where at most {allowed:g} is allowed"
        )


def value(figure: str, row: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """A figure of a result; None where a part of it is missing."""
    key, divisor = RELATIVE.get(figure, (figure, None))
    if divisor is None:
        return row.get(key)
    below = reference.get(key) if divisor == REFERENCE else row.get(divisor)
    return row[key] / below if below and key in row else None


def findings(rows: Iterable[dict[str, Any]]) -> list[Finding]:
    """Each target beside each figure that it is for, among results."""
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
