"""The page of speed benchmarks and its plots, made of the committed results and nothing else.

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

How long a step takes, what it moves and holds and what it costs to compile, beside what else there
is. This page and its plots are made by `python benchmarks/report.py` of the committed results in
`benchmarks/results/`; `make bench` measures again and rewrites both."""

_METHOD = f"""## How it is measured

- **The same work.** Every contender gets the same parameters, the same gradients (two sets in turn
  where memory allows) and the same hyperparameters, weight decay among them, and
  `tests/test_benchmarks.py` compares what each trains with a formula in float64. Three things
  differ: `torch.optim.Adamax` adds the decay to the gradients (L2), which is a pass over the
  gradients more and no decoupled decay; Keras adds eps outside the maximum; `optax.adamw` is
  another rule, for scale. "bfloat16" contenders have bfloat16 parameters and gradients.
- **A step** of a JAX contender is the update and its application in one jit, parameters and state
  donated, gradients not. Of PyTorch's it is `optimizer.step()`, with the gradients already in
  place and as many threads as the machine has cores.
- **Paired.** A contender and `{REFERENCE.name}` in float32 alternate in one process, warm. A
  sample is one step and the wait for its end, or as many as make 2 ms (on a GPU 50 ms) and one
  wait. The ratio is the median of the ratios of neighbours, beside its quartiles: other load of
  the machine falls on both. The row of `{REFERENCE.name}` against itself shows what noise is
  left. "In turn" marks pairs that do not fit in memory together: blocks of a few steps alternate.
- **Bytes.** "Least" is what any step must move: gradients read, parameters and state read and
  written. "Program" is what XLA's cost analysis says that the compiled step accesses, loop by
  loop, as if nothing stayed in a cache between two loops, and the body of a loop with an unknown
  number of turns counted once. "Share" is the least bytes by the median time, relative to the
  bandwidth of a copy (a negation of 512 MB, 4 GB on a GPU, in place or not, the best of a few)
  measured in the same process: 100% would be a step as fast as its memory traffic allows.
- **Cold.** Times to trace and to compile are those of fresh processes without persistent caches,
  from shapes alone where the library can; peak memory is that of a fresh process after three steps
  with one set of gradients, beyond what it held after a step on eight parameters."""


def duration(seconds: float) -> str:
    """Three digits, with a unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def ratio(row: Row) -> str:
    """Median and quartiles."""
    found = row["ratio"]
    marked = ", in turn" if row["mode"] == "in turn" else ""
    return f"**{found['median']:.2f}** ({found['low']:.2f}-{found['high']:.2f}){marked}"


def describe(tree: str) -> str:
    """A heading."""
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


# Of each section: its heading, what is to be said first, columns, cells of a row.
_SECTIONS: dict[str, tuple[str, str, tuple[str, ...], Callable[[Row], list[str]]]] = {
    "step": (
        "Time of a step",
        f"Ratios are to `{REFERENCE.name}`: less is faster. Bytes are a parameter.",
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
        f"`update` alone, called without jit, relative to that of `{REFERENCE.name}`.",
        ("contender", "time, relative (quartiles)", "time"),
        _eager_cells,
    ),
    "compile": (
        "Tracing and compiling",
        'Medians of fresh processes. "Trace" includes lowering; `torch.compile` does not tell the '
        "two apart: its time is that of the first two steps beyond the two after them, so it "
        "includes making the state.",
        ("contender", "trace", "compile", "processes"),
        _compile_cells,
    ),
    "memory": (
        "Peak memory",
        "Resident memory on a CPU (the compiler's included), memory of the device on a GPU. Bytes "
        'are a parameter; "least" is parameters, gradients and state.',
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
            lines += ["", *table(columns, map(cells, measured), figures=True)]
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
        "One leaf of n parameters; nanoseconds a parameter, and the ratio to "
        f"`{REFERENCE.name}` at the same time: the machine's speed drifts between rows. Small "
        "leaves stay in caches, and what counts there is the cost of a call.",
        "",
        f"![Time a parameter against the number of parameters]({GROWTH_PLOT})",
        "",
        *table(
            ["contender", *(f"n = {float(tree.removeprefix(LEAF)):.0e}" for tree in sizes)],
            ([name, *(cell(name, tree) for tree in sizes)] for name in names),
            figures=True,
        ),
    ]
    if any(row.get("mode") == "in turn" for row in rows):
        lines += ["", r"\* in turn with the reference, not side by side."]
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
    lines = ["## What was not run", "", "Of what `make bench` runs:", ""]
    for section, plan in PLAN.items():
        have = {(row["tree"], row["contender"]) for row in found.get(section, [])}
        for tree, names in plan.items():
            absent = [name for name in names if (tree, name) not in have]
            if absent:
                which = "all contenders" if len(absent) == len(names) else "; ".join(absent)
                lines.append(f"- {section}, {tree}: {which}.")
    if not GPU.exists():
        lines += [
            "- A GPU: none was at hand, and no figure here is of one. With versions of JAX and "
            "PyTorch for CUDA, "
            f"`python benchmarks/speed.py --output benchmarks/results/{GPU.name}` measures the "
            "same there, and `python benchmarks/report.py` adds it to this page."
        ]
    return lines if lines[4:] else []


def body(found: results.Results, *, plot: bool = False) -> list[str]:
    """The sections that one file of results has; the plots are of one file alone."""
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
    """The whole page, in Markdown, of the results on a CPU, with 512-bit vectors, on a GPU."""
    lines = [*_INTRODUCTION.splitlines(), "", *_METHOD.splitlines(), "", *body(cpu, plot=True)]
    if wide is not None:
        lines += ["## With vectors of 512 bits", "", *_below(body(wide))]
    if gpu is not None:
        lines += ["## On a GPU", "", *_below(body(gpu))]
    return "\n".join([*lines, *_not_run(cpu)]).rstrip() + "\n"


def committed() -> str:
    """The page of the committed results."""
    others = (results.load(path) if path.exists() else None for path in (WIDE, GPU))
    return page(results.load(OUTPUT), *others)


def summary(found: results.Results) -> list[str]:
    """The table of the README: GPT-2 small."""
    rows = _in_order(row for row in found["step"] if row["tree"] == "gpt2-small")
    return table(
        ("GPT-2 small, 124 million parameters", "time of a step", "state, bytes a parameter"),
        (
            (row["contender"], f"{row['ratio']['median']:.2f}", f"{row['state_bytes']:.0f}")
            for row in rows
            if row["contender"] in _IN_SUMMARY and "skipped" not in row
        ),
        figures=True,
    )


def main() -> None:
    """Writes the page and the plots, and prints the table of the README."""
    import plots  # Only here: the text needs no matplotlib.

    PAGE.write_text(committed(), encoding="utf-8")
    found = results.load(OUTPUT)
    plots.step_times(Path(PAGE.parent / STEP_PLOT), found.get("step", []))
    plots.growth(Path(PAGE.parent / GROWTH_PLOT), found.get("growth", []))
    print(*summary(found), sep="\n")


if __name__ == "__main__":
    main()
