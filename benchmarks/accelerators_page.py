"""The page of what was compiled for accelerators, rendered from the committed results alone.

python benchmarks/accelerators_page.py    # writes docs/accelerators.md
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import accelerators
import chips
import compiled_code
import cycles
import targets
import trees
from markdown_table import table

PAGE = accelerators.HERE.parent / "docs" / "accelerators.md"
Row = dict[str, Any]

_INTRODUCTION = """# Compiled for accelerators

Every format and rounding, compiled for TPUs and GPUs by the compilers that their users have: how
many kernels a step becomes, how many bytes they move, and what compiling costs. **Nothing on
this page was run.** The compilers need no chip, and none was available, so no figure is the time
of a step. Kernels, bytes, temporaries, bundles and machine instructions are counted in the
compiled program and are exact. Cycles are an estimate by the TPU compiler that
[omits a lot](#what-the-cycles-count). Seconds are processor time on a shared machine.

`make accelerators` compiles everything again in an environment of its own and rewrites this
page; `make accelerators-check` holds one leaf to the [targets](#targets) in less than 3 minutes.

A step is the update and its application in one jit, with parameters and state donated. libtpu
compiles for v5e, v6e and v5p; XLA's compiler for CUDA compiles for H100 and B200 from XLA's own
descriptions of them. "One leaf" is an array of 4096 x 8192. The trees are those of
[Benchmarks](benchmarks.md): GPT-2 small, ResNet-50 with height and width of the kernels last
("resnet-50") and first ("resnet-50-hwio"), and NVAE."""

_LEGEND = f"""- **Rows** name the dtype of the parameters, how moments are stored, and how
  bfloat16 parameters are rounded. Gradients have the dtype of the parameters.
- **Kernels**: how many touch more than {compiled_code.LARGE:,} bytes, per leaf that has to move
  more than that. Fewer than 1 means that XLA merges the steps of several leaves.
- **Bytes** are read from and written to the chip's main memory, per parameter. In brackets
  stands the least possible: gradients read, parameters and state read and written, once. Copies
  between main memory and the memory on a TPU chip count on the side of main memory.
- **Temporaries** are what the program allocates besides arguments and results, in bytes per
  parameter.
- **Cycles** are the TPU compiler's estimates, summed over all kernels, per 1,000 parameters. In
  brackets: relative to `{targets.REFERENCE}` on the same chip.
- **Bundles** are the instruction words that a TPU core issues per 1,000 parameters, counted in
  the scheduled code: the cycles that its arithmetic takes if it never waits. The two cores of
  v5p share them. The figure is missing where the code of a kernel contains loops.
- **Instructions** are those of the disassembled kernel, per element.
- **Bound** is a lower bound of the time, in picoseconds per parameter: the larger of bytes over
  the stated bandwidth (H100 3.35 TB/s, B200 7.67 TB/s) and instructions over the issue rate (4 x
  32 per clock for each of H100's 132 processors at 1.755 GHz, and of B200's 148 at 1.965 GHz)."""

_CYCLES = """## What the cycles count

`benchmarks/cycles.py` compiles kernels that differ in one respect, to find out what the estimate
responds to:

- **It is the larger of two terms, memory and arithmetic.** Ten operations per element cost what
  one does as long as memory takes longer; a hundred cost more. While arithmetic hides behind
  memory, only its part in the first window counts, since nothing overlaps with that.
- **Memory** is bytes divided by a rate in bytes per cycle: {rates}. At the clocks implied by the
  published peaks of matrix products, that is {shares} of the published bandwidth. A kernel whose
  results are all narrower than 32 bits is charged {narrow} more cycles per 1,000 elements on
  v5e, which its bytes do not explain; a step of bfloat16 parameters with bfloat16 moments is
  such a kernel.
- **Arithmetic** is a price list of operations, not a count of the scheduled code. Integer
  operations are priced to within 1%. A multiplication and a power of two are both priced as
  three integer operations; on v5e the code issues {exp2} times the bundles of that price for
  powers of two, {sqrt} times for square roots and {division} times for divisions.
- **The start of a kernel** is included: {small} cycles on v5e for a leaf of 1,024 elements, of
  which the bytes account for 28.
- **The schedule is not included**: what a unit can issue at once, chains of dependent
  operations, spilled registers. Neither are waits for copies between the two memories, which run
  beside the kernels of a tree: a kernel finds those bytes on the chip free of charge, and a tree
  can have fewer cycles than its bytes allow.

Cycles check the bytes of a kernel, bundles its arithmetic; where bundles exceed cycles, they are
the lower bound of its time."""

_MISSED = 'Missed targets. "Observed once" marks a single experiment without a committed script.'


def _ratio(row: Row, key: str, reference: Row) -> str:
    return f" ({row[key] / reference[key]:.2f})" if reference.get(key) else ""


def _tpu_cells(row: Row, reference: Row) -> list[str]:
    issued = row.get("bundles")
    return [
        f"{row['cycles'] * 1000:.1f}{_ratio(row, 'cycles', reference)}",
        f"{issued * 1000:.1f}" if issued else "",
    ]


def bound(row: Row) -> tuple[float, float]:
    """Lower bounds of the seconds per parameter on a GPU, for memory and for instructions."""
    chip = chips.CHIPS[row["chip"]]
    return row["bytes"] / chip.bandwidth, row.get("instructions", 0) / chip.issue


def _gpu_cells(row: Row, _: Row) -> list[str]:
    memory, issue = bound(row)
    if not issue:
        return ["", ""]
    word = "memory" if memory >= issue else "instructions"
    return [f"{row['instructions']:.0f}", f"{max(memory, issue) * 1e12:.2f}, {word}"]


def _chip(chip: str, rows: list[Row]) -> list[str]:
    """The table of a tree on a chip."""
    cells, more = (
        (_tpu_cells, ["cycles (relative)", "bundles"])
        if chip in chips.TPUS
        else (_gpu_cells, ["instructions", "bound, ps"])
    )
    reference = next((row for row in rows if row["row"] == targets.REFERENCE), {})
    found = [
        [
            row["row"],
            f"{row['kernels']:.3g}",
            f"{row['bytes']:.2f} ({row['least']:.0f})",
            f"{row['temporaries']:.2f}",
            *cells(row, reference),
        ]
        for row in rows
        if "kernels" in row
    ]
    while more and not any(row[-1] for row in found):
        found, more = [row[:-1] for row in found], more[:-1]
    columns = ["parameters, moments, rounding", "kernels", "bytes (least)", "temporaries", *more]
    return [f"**{chip}**", "", *table(columns, found, figures=1), ""] if found else []


def _seconds(rows: list[Row]) -> list[str]:
    """Processor seconds to trace and compile, for all chips."""
    have = [chip for chip in chips.CHIPS if any(row["chip"] == chip for row in rows)]
    found = {(row["row"], row["chip"]): row for row in rows}

    def cell(name: str, chip: str) -> str:
        row, reference = found.get((name, chip), {}), found.get((targets.REFERENCE, chip), {})
        if "seconds" not in row:
            return row.get("skipped", "")
        return f"{row['seconds']:.3g}{_ratio(row, 'seconds', reference)}"

    names = [name for name in targets.ROWS if any(row["row"] == name for row in rows)]
    cells = ([name, *(cell(name, chip) for chip in have)] for name in names)
    return [
        "Processor seconds to trace and compile (relative to Optax):",
        "",
        *table(["parameters, moments, rounding", *have], cells, figures=1),
        "",
    ]


def _tree(tree: str, rows: list[Row]) -> list[str]:
    title = "One leaf" if tree == targets.LEAF else f"{tree}: {len(trees.shapes(tree)):,} leaves"
    lines = [f"## {title}", ""]
    for chip in chips.CHIPS:
        lines += _chip(chip, [row for row in rows if row["chip"] == chip])
    # One leaf compiles too fast to compare.
    return lines if tree == targets.LEAF else lines + _seconds(rows)


def _where(found: Iterable[targets.Finding]) -> str:
    return "; ".join(f"{x.tree}, {x.chip} {x.value:.3g}" for x in found)


def _targets(rows: list[Row]) -> list[str]:
    """All targets with their worst figures, and where and why they are missed."""
    findings = targets.findings(rows)
    summary, misses = [], []
    for target in targets.TARGETS:
        mine = [found for found in findings if found.target is target]
        if not mine:
            continue
        worst = max(mine, key=lambda found: found.value)
        missed = [found for found in mine if not found.met]
        met = f"{len(mine) - len(missed)} of {len(mine)}"
        summary.append(
            [target.words, _names(target), f"{target.bound:g}", f"{worst.value:.3g}", met]
        )
        for name in dict.fromkeys(found.row for found in missed):
            for cause in dict.fromkeys(_cause(found) for found in missed if found.row == name):
                same = [x for x in missed if x.row == name and _cause(x) == cause]
                misses.append([name, target.words, f"{target.bound:g}", _where(same), cause])
    lines = ["## Targets", "", *table(["figure", "rows", "at most", "worst", "met"], summary), ""]
    if misses:
        columns = ["parameters, moments, rounding", "figure", "at most", "is", "cause"]
        lines += [_MISSED, "", *table(columns, misses), ""]
    return lines


def _cause(found: targets.Finding) -> str:
    return found.shortfall.cause if found.shortfall else "not explained"


def _names(target: targets.Target) -> str:
    groups = {targets.OURS: "all", targets.PLAIN: 'all but "exact"', targets.EXACT: 'all "exact"'}
    return groups.get(target.rows, "; ".join(target.rows))


def _experiment(found: dict[str, Any]) -> list[str]:
    """What the cycles count, with the tables behind it."""
    rows = {(x["chip"], x["kernel"], x["repeats"]): x for x in found["bytes"] + found["operations"]}
    rates = {
        chip: sorted(
            kernel.bytes * 1e3 / rows[chip, kernel.name, 1]["cycles"] for kernel in cycles.BYTES[:2]
        )
        for chip in chips.TPUS
    }
    shares = {
        chip: rates[chip][-1] * chips.CHIPS[chip].clock / chips.CHIPS[chip].bandwidth
        for chip in chips.TPUS
        if chips.CHIPS[chip].clock
    }

    narrow = rows["v5e", cycles.BYTES[-1].name, 1]

    def excess(kernel: int) -> str:
        row = rows["v5e", cycles.OPERATIONS[kernel].name, 100]
        return f"{row['bundles'] / row['cycles']:.1f}"

    text = _CYCLES.format(
        rates=", ".join(f"{_range(rate)} on {chip}" for chip, rate in rates.items()),
        shares=" and ".join(f"{share:.0%} on {chip}" for chip, share in shares.items()),
        division=excess(1),
        sqrt=excess(2),
        exp2=excess(3),
        narrow=f"{narrow['cycles'] - 4e3 / rates['v5e'][-1]:.0f}",
        small=f"{found['small'][0]['cycles']:,.0f}",
    )
    lines = [*text.splitlines(), "", "Cycles (and bundles) per 1,000 elements:", ""]
    cells = []
    for kernel, repeats in dict.fromkeys((name, k) for _, name, k in rows):
        of = [rows[chip, kernel, repeats] for chip in chips.TPUS]
        size = f"{of[0]['bytes']}"
        cells.append([f"{kernel}, {repeats}x", size, *map(_pair, of)])
    return [*lines, *table(["kernel", "bytes", *chips.TPUS], cells, figures=1), ""]


def _range(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:,.0f}" for value in values))


def _pair(row: Row) -> str:
    return (
        f"{row['cycles']:.1f} ({row['bundles']:.1f})" if row["bundles"] else f"{row['cycles']:.1f}"
    )


def page(found: dict[str, Any], experiment: dict[str, Any]) -> str:
    """The whole page, in Markdown."""
    lines = [
        _INTRODUCTION,
        "",
        *_targets(found["rows"]),
        "## How to read the tables",
        "",
        _LEGEND,
        "",
    ]
    for tree in accelerators.TREES:
        rows = [row for row in found["rows"] if row["tree"] == tree]
        lines += _tree(tree, rows) if rows else []
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [*_experiment(experiment), *_absent(found["rows"]), "## Versions", "", f"{versions}."]
    return "\n".join(lines) + "\n"


def _absent(rows: list[Row]) -> list[str]:
    """The part of the plan that has no results."""
    have = {(row["tree"], row["row"], row["chip"]) for row in rows}
    left: dict[tuple[str, str], int] = {}
    for job in accelerators.plan((), tuple(chips.CHIPS), accelerators.TREES):
        if job not in have:
            left[job.tree, job.chip] = left.get((job.tree, job.chip), 0) + 1
    lines = [f"- {tree}, {chip}: {number} rows." for (tree, chip), number in left.items()]
    words = "Part of `make accelerators`, but without a result here:"
    return ["## What was not compiled", "", words, "", *lines, ""] if lines else []


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def committed() -> str:
    """The page rendered from the committed results."""
    return page(_load(accelerators.RESULTS), _load(cycles.RESULTS))


def main() -> None:
    """Writes the page."""
    PAGE.write_text(committed(), encoding="utf-8")


if __name__ == "__main__":
    main()
