"""The page of speed benchmarks and its plots, rendered from the committed results alone.

python benchmarks/report.py      # writes docs/benchmarks.md, docs/speed_*.png
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import results
from contenders import CONTENDERS, REFERENCE
from markdown_table import table
from speed import HERE, OUTPUT, PLAN
from trees import LEAF, count, shapes

PAGE = HERE.parent / "docs" / "benchmarks.md"
GPU = HERE / "results" / "speed-gpu.json"
WIDE = HERE / "results" / "speed-cpu-512.json"
STEP_PLOT, GROWTH_PLOT = "speed_step.png", "speed_growth.png"

_IN_SUMMARY = (
    REFERENCE.name,
    *(f"adamaxw float32, moments {moments}" for moments in ("float32", "bfloat16", "uint8")),
    "torch.optim.Adamax, foreach",
    "torch.optim.Adamax, compiled",
    "keras.optimizers.Adamax",
)

Row = dict[str, Any]

_INTRODUCTION = """# Benchmarks

How long a step takes, how many bytes it moves and holds, and how long it takes to compile,
compared with other optimizers. `python benchmarks/report.py` writes this page and its plots from
the committed results in `benchmarks/results/`; `make bench` measures again and rewrites both."""

_METHOD = f"""## How it is measured

- **The same work.** All contenders get the same parameters, gradients (two alternating sets
  where memory allows) and hyperparameters, weight decay included, and `tests/test_benchmarks.py`
  compares what each computes with a float64 formula. Three things differ: `torch.optim.Adamax`
  adds the decay to the gradients (L2), which takes one more pass over them and is not decoupled;
  Keras adds eps outside the maximum; `optax.adamw` is another rule, included for scale.
  "bfloat16" contenders have bfloat16 parameters and gradients.
- **A step** of a JAX contender is the update and its application in one jit, with parameters and
  state donated. For PyTorch it is `optimizer.step()`, with the gradients in place and one thread
  per core.
- **Paired.** A contender and `{REFERENCE.name}` in float32 alternate in one process, both warm.
  A sample is one step and the wait for its end, or as many steps as fill 2 ms (50 ms on a GPU)
  and one wait. The ratio is the median over neighbouring samples, with its quartiles, so other
  load on the machine affects both sides alike. The row of `{REFERENCE.name}` against itself
  shows the remaining noise. "In turn" marks pairs that do not fit in memory together: blocks of
  a few steps alternate.
- **Bytes.** "Least" is what any step must move: gradients read, parameters and state read and
  written. "Program" is what XLA's cost analysis counts for the compiled step, loop by loop, as
  if nothing stayed in a cache between two loops, and with the body of a loop of unknown length
  counted once. "Share" is the least bytes over the median time, relative to the bandwidth of a
  copy (a negation of 512 MB, 4 GB on a GPU, in place or not, the best of a few) in the same
  process: at 100%, a step is as fast as its memory traffic allows.
- **Cold.** Tracing and compiling are timed in fresh processes without persistent caches, from
  shapes alone where the library can do that. Peak memory is that of a fresh process after three
  steps with one set of gradients, beyond what it held after a step on eight parameters."""


def duration(seconds: float) -> str:
    """Three digits, in the largest unit that is not above the duration."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def ratio(row: Row) -> str:
    """The ratio of a row: median and quartiles."""
    found = row["ratio"]
    marked = ", in turn" if row["mode"] == "in turn" else ""
    return f"**{found['median']:.2f}** ({found['low']:.2f}-{found['high']:.2f}){marked}"


def describe(tree: str) -> str:
    """The heading of a tree."""
    found = shapes(tree)
    leaves = f"{len(found):,} leaves" if len(found) > 1 else "1 leaf"
    return f"{tree}: {count(found):,} parameters in {leaves}"


def _bytes(row: Row, kind: str) -> str:
    return f"{row[kind]:.2f}" if kind in row else ""


def _step_cells(row: Row) -> list[str]:
    share = row["least_bandwidth"] / row["bandwidth"]
    return [
        row["contender"],
        ratio(row),
        duration(row["seconds"]["median"]),
        f"{share:.0%}",
        _bytes(row, "least_bytes"),
        _bytes(row, "program_bytes"),
        _bytes(row, "state_bytes"),
        _bytes(row, "temporaries"),
    ]


def _eager_cells(row: Row) -> list[str]:
    return [row["contender"], ratio(row), duration(row["seconds"]["median"])]


def _compile_cells(row: Row) -> list[str]:
    trace = row["trace"]["median"]
    cells = [duration(trace) if trace else "", duration(row["compile"]["median"])]
    return [row["contender"], *cells, str(row["processes"])]


def _memory_cells(row: Row) -> list[str]:
    return [
        row["contender"],
        f"{row['total_bytes'] / 1e9:.2f}",
        _bytes(row, "peak_bytes"),
        _bytes(row, "least_bytes"),
    ]


# For each section: heading, introduction, columns, and a function from a row to its cells.
_SECTIONS: dict[str, tuple[str, str, tuple[str, ...], Callable[[Row], list[str]]]] = {
    "step": (
        "Time of a step",
        f"Ratios are to `{REFERENCE.name}`: less is faster. Bytes are per parameter.",
        (
            "contender",
            "time, relative (quartiles)",
            "time",
            "share",
            "least",
            "program",
            "state",
            "temporary",
        ),
        _step_cells,
    ),
    "eager": (
        "Eager update",
        f"`update` alone, called without jit, relative to `{REFERENCE.name}`.",
        ("contender", "time, relative (quartiles)", "time"),
        _eager_cells,
    ),
    "compile": (
        "Tracing and compiling",
        'Medians of fresh processes. "Trace" includes lowering. `torch.compile` does not separate '
        "the two: its time is that of the first two steps minus that of the next two, and includes "
        "allocating the state.",
        ("contender", "trace", "compile", "processes"),
        _compile_cells,
    ),
    "memory": (
        "Peak memory",
        "Resident memory on a CPU, the compiler's included; device memory on a GPU. Bytes are per "
        'parameter; "least" is parameters, gradients and state.',
        ("contender", "peak, GB", "peak, bytes", "least, bytes"),
        _memory_cells,
    ),
}


def _in_order(rows: Iterable[Row]) -> list[Row]:
    names = list(CONTENDERS)
    return sorted(rows, key=lambda row: names.index(row["contender"]))


def _section(section: str, rows: list[Row], *, plot: bool) -> list[str]:
    title, text, columns, cells = _SECTIONS[section]
    lines = [f"## {title}", "", text]
    if section == "step" and plot:
        lines += ["", f"![Time of a step relative to {REFERENCE.name}]({STEP_PLOT})"]
    for tree in sorted({row["tree"] for row in rows}, key=lambda tree: (count(shapes(tree)), tree)):
        found = _in_order(row for row in rows if row["tree"] == tree)
        measured = [row for row in found if "skipped" not in row]
        lines += ["", f"### {describe(tree)}" if section == "step" else f"**{describe(tree)}**"]
        if section == "step" and measured:
            speeds = sorted({f"{row['bandwidth'] / 1e9:.1f}" for row in measured}, key=float)
            lines += ["", f"Bandwidth of a copy: {' and '.join(speeds)} GB/s."]
        if measured:
            lines += ["", *table(columns, map(cells, measured), figures=1)]
        lines += _skipped(found)
    return [*lines, "", *_provenance(rows), ""]


def _skipped(rows: list[Row]) -> list[str]:
    skips = [row for row in rows if "skipped" in row]
    lines = [f"- Skipped: {row['contender']}: {row['skipped']}." for row in skips]
    return ["", *lines] if lines else []


def _growth(rows: list[Row]) -> list[str]:
    sizes = sorted({row["tree"] for row in rows}, key=lambda tree: (count(shapes(tree)), tree))
    names = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    found = {(row["contender"], row["tree"]): row for row in rows}

    def cell(name: str, tree: str) -> str:
        row = found.get((name, tree), {})
        if "seconds" not in row:
            return "skipped" if row else ""
        marked = "*" if row["mode"] == "in turn" else ""
        nanoseconds = row["seconds"]["median"] / count(shapes(tree)) * 1e9
        return f"{nanoseconds:.3g} ({row['ratio']['median']:.2f}){marked}"

    lines = [
        "## Growth with the number of parameters",
        "",
        "One leaf of n parameters: nanoseconds per parameter, and in brackets the ratio to "
        f"`{REFERENCE.name}` in the same process, since the machine's speed drifts between rows. "
        "Small leaves stay in caches, where the cost of a call dominates.",
        "",
        f"![Time per parameter against the number of parameters]({GROWTH_PLOT})",
        "",
        *table(
            ["contender", *(f"n = {float(tree.removeprefix(LEAF)):.0e}" for tree in sizes)],
            ([name, *(cell(name, tree) for tree in sizes)] for name in names),
            figures=1,
        ),
    ]
    if any(row.get("mode") == "in turn" for row in rows):
        lines += ["", r"\* In turn with the reference, not alternating with it."]
    lines += _skipped([row | {"contender": f"{row['contender']}, {row['tree']}"} for row in rows])
    return [*lines, "", *_provenance(rows), ""]


def _provenance(rows: list[Row]) -> list[str]:
    keys = sorted({row["run"] for row in rows}, key=int)
    return [f"Measured by run{'s' if len(keys) > 1 else ''} {', '.join(keys)} below."]


def _runs(found: results.Results) -> list[str]:
    lines = ["## Runs", ""]
    for key, run in found["runs"].items():
        machine = run["machine"]
        packages = run["versions"]
        installed = ", ".join(f"{name} {v}" for name, v in packages.items() if v)
        absent = ", ".join(name for name, v in packages.items() if not v)
        device = "" if machine["backend"] == "cpu" else f", {machine['device']}"
        lines += [
            f"- Run {key}: `{run['command']}`, {run['date']}: {machine['cpu']}, "
            f"{machine['architecture']}, {machine['cores']} cores, {machine['memory_gb']} GB"
            f"{device}; load before the start {run['load']}; backend {machine['backend']}; "
            + installed
            + (f"; not installed: {absent}" if absent else "")
        ]
    return [*lines, ""]


def _not_run(found: results.Results) -> list[str]:
    lines = ["## What was not run", "", "Part of `make bench`, but without a result here:", ""]
    for section, plan in PLAN.items():
        have = {(row["tree"], row["contender"]) for row in found.get(section, [])}
        for tree, names in plan.items():
            absent = [name for name in names if (tree, name) not in have]
            if absent:
                which = "all contenders" if len(absent) == len(names) else "; ".join(absent)
                lines.append(f"- {section}, {tree}: {which}.")
    if not GPU.exists():
        lines += [
            "- GPUs. With JAX and PyTorch for CUDA, "
            f"`python benchmarks/speed.py --output benchmarks/results/{GPU.name}` measures the "
            "same on one, and `python benchmarks/report.py` adds it to this page."
        ]
    return lines if lines[4:] else []


def body(found: results.Results, *, plot: bool = False) -> list[str]:
    """The sections of one file of results; only the CPU's have plots."""
    lines = []
    for section in _SECTIONS:
        if found.get(section):
            lines += _section(section, found[section], plot=plot)
    if found.get("growth"):
        lines += _growth(found["growth"])
    return [*lines, *_runs(found)]


def _below(lines: list[str]) -> list[str]:
    return [f"#{line}" if line.startswith("#") else line for line in lines]


def page(
    cpu: results.Results, wide: results.Results | None = None, gpu: results.Results | None = None
) -> str:
    """The whole page in Markdown, from results on a CPU, with 512-bit vectors, and on a GPU."""
    lines = [*_INTRODUCTION.splitlines(), "", *_METHOD.splitlines(), "", *body(cpu, plot=True)]
    if wide is not None:
        lines += ["## With vectors of 512 bits", "", *_below(body(wide))]
    if gpu is not None:
        lines += ["## On a GPU", "", *_below(body(gpu))]
    return "\n".join([*lines, *_not_run(cpu)]).rstrip() + "\n"


def committed() -> str:
    """The page rendered from the committed results."""
    others = (results.load(path) if path.exists() else None for path in (WIDE, GPU))
    return page(results.load(OUTPUT), *others)


def summary(found: results.Results) -> list[str]:
    """A short table for other pages: GPT-2 small."""
    rows = _in_order(row for row in found["step"] if row["tree"] == "gpt2-small")
    return table(
        ("GPT-2 small, 124 million parameters", "time of a step", "state, bytes per parameter"),
        (
            (row["contender"], f"{row['ratio']['median']:.2f}", f"{row['state_bytes']:.0f}")
            for row in rows
            if row["contender"] in _IN_SUMMARY and "skipped" not in row
        ),
        figures=1,
    )


def extremes(found: results.Results) -> list[str]:
    """A short table for other pages: the best and the worst ratio among trees of models."""
    rows = []
    for name in (*_IN_SUMMARY[1:4], "adamaxw bfloat16 stochastic, moments uint8"):
        mine = [row for row in found["step"] if row["contender"] == name and "ratio" in row]
        ratios = [row["ratio"]["median"] for row in mine]
        params, _, moments = name.removeprefix("adamaxw ").partition(", moments ")
        size = f"{max(row['state_bytes'] for row in mine):.0f}"
        cells = [params.replace(" ", ", "), moments, size]
        rows.append([*cells, f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
    columns = ("parameters", "moments", "bytes", "best", "worst")
    return table(columns, rows, figures=2)


def main() -> None:
    """Writes the page and the plots; prints the short tables."""
    import plots  # Imported here because the text does not need matplotlib.

    PAGE.write_text(committed(), encoding="utf-8")
    found = results.load(OUTPUT)
    plots.step_times(Path(PAGE.parent / STEP_PLOT), found.get("step", []))
    plots.growth(Path(PAGE.parent / GROWTH_PLOT), found.get("growth", []))
    print(*summary(found), "", *extremes(found), sep="\n")


if __name__ == "__main__":
    main()
