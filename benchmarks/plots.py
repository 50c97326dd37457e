"""The plots of the benchmarks page."""

from pathlib import Path
from typing import Any

from contenders import CONTENDERS, REFERENCE
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from trees import count, shapes

Row = dict[str, Any]

_OURS, _OTHERS = "#c1440e", "#44546a"
_MARKERS = "osD^vP*X"


def step_times(path: Path, rows: list[Row]) -> None:
    """One panel per tree; one dot per contender, with its quartiles."""
    timed = [row for row in rows if "ratio" in row]
    trees = sorted({row["tree"] for row in timed}, key=lambda tree: (count(shapes(tree)), tree))
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in timed)]
    figure = Figure(figsize=(3.2 + 2.6 * len(trees), 1.2 + 0.28 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(trees), sharey=True, squeeze=False)[0]
    for tree, axes in zip(trees, panels, strict=True):
        for row in timed:
            if row["tree"] != tree:
                continue
            place, found = names.index(row["contender"]), row["ratio"]
            color = _OURS if row["contender"].startswith("adamaxw") else _OTHERS
            axes.plot([found["low"], found["high"]], [place, place], color=color, lw=2, alpha=0.5)
            axes.plot(found["median"], place, "o", color=color, ms=6)
        axes.axvline(1, color="black", lw=0.8)
        axes.set(xscale="log", title=tree)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.45), max(high, 2.2))
        axes.set_xticks(
            [x for x in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64) if low * 0.8 < x < high * 1.2]
        )
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.grid(axis="both", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel(f"time of a step relative to {REFERENCE.name} in float32; bars: quartiles")
    figure.savefig(path, dpi=110)


def growth(path: Path, rows: list[Row]) -> None:
    """Time per parameter against the number of parameters, one line per contender."""
    timed = [row for row in rows if "seconds" in row]
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in timed)]
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(names, _MARKERS, strict=False):
        points = sorted(
            (count(shapes(row["tree"])), row["seconds"]["median"])
            for row in timed
            if row["contender"] == name
        )
        sizes = [size for size, _ in points]
        axes.loglog(sizes, [1e9 * s / size for size, s in points], marker=marker, ms=5, label=name)
    axes.set(xlabel="parameters in one leaf", ylabel="nanoseconds per parameter")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
