"""Time, memory traffic, memory and compile time of a step, compared with other optimizers.

Each section measures on each tree in processes of its own, and its rows go into the file of results
as they come; rows of other sections, trees and contenders stay there. Run it with

    python benchmarks/speed.py                                    # everything; see make bench
    python benchmarks/speed.py --sections step --trees resnet-50 --contenders uint8 keras
    python benchmarks/speed.py --output benchmarks/results/speed-gpu.json            # on a GPU
"""

import argparse
import datetime
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import results
from contenders import CONTENDERS, REFERENCE, matching
from processes import rows_of
from results import quartiles
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from trees import LEAF, shapes

HERE = Path(__file__).parent
OUTPUT = HERE / "results" / "speed-cpu.json"

# Seconds for the rounds of one contender.
_BUDGET = 4.0
# Fresh processes for compile times, but only one if it takes longer than `_QUICK` seconds.
_REPEATS_COMPILE = 3
_QUICK = 15.0

_FLOAT32 = [f"adamaxw float32, moments {moments}" for moments in ("float32", "bfloat16", "uint8")]
_COMPILING_PEERS = [
    name for name, c in CONTENDERS.items() if c.compiles and not name.startswith("adamaxw")
]
_SMALLEST = "adamaxw bfloat16 stochastic, moments uint8"
_COMPILED = "torch.optim.Adamax, compiled"
_OTHERS = [
    "torch.optim.Adamax, loop",
    "torch.optim.Adamax, foreach",
    _COMPILED,
    "keras.optimizers.Adamax",
]
_GROWING = [REFERENCE.name, _FLOAT32[0], _FLOAT32[2], "torch.optim.Adamax, loop"]

# What is measured by default: all contenders on trees of usual size, fewer where it takes long. A
# contender that is not listed for a tree was not run there, and the page does not show it. XLA
# takes 20 GB to compile a uint8 step of the 2,566 leaves of nvae-cifar10.
PLAN: dict[str, dict[str, list[str]]] = {
    "step": {
        "resnet-50": [REFERENCE.name, *_FLOAT32, *_OTHERS],
        "resnet-50-hwio": [REFERENCE.name, *_FLOAT32, _SMALLEST],
        "gpt2-small": list(CONTENDERS),
        "nvae-cifar10": [REFERENCE.name, *_FLOAT32, "torch.optim.Adamax, foreach"],
        "llama-3.2-1b": [_FLOAT32[0], _FLOAT32[2], _SMALLEST],
    },
    "eager": {
        tree: [REFERENCE.name, *_FLOAT32]
        for tree in (f"{LEAF}1000", "resnet-50", "gpt2-small", "nvae-mnist")
    },
    "compile": {
        "gpt2-small": [*_COMPILING_PEERS, *_FLOAT32, _SMALLEST],
        "resnet-50": [REFERENCE.name, *_FLOAT32],
        "nvae-cifar10": [REFERENCE.name, *_FLOAT32],
    },
    "memory": {"gpt2-small": [REFERENCE.name, *_FLOAT32, _SMALLEST, *_OTHERS]},
    "growth": {
        **{f"{LEAF}{10**k}": [*_GROWING, _COMPILED] for k in range(3, 9)},
        f"{LEAF}{10**9}": _FLOAT32[::2],
    },
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; `jobs` lists what to run, as (section, tree, contenders)."""
    parser = argparse.ArgumentParser(description="Measure the speed of adamaxw and its peers.")
    parser.add_argument("--sections", nargs="+", choices=PLAN, default=list(PLAN))
    parser.add_argument("--trees", nargs="+", help=f"names in the JSON, or {LEAF}<n>")
    parser.add_argument("--contenders", nargs="+", metavar="PART", help="parts of their names")
    parser.add_argument("--rounds", type=int, default=30, help="at most, of a contender")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write or merge into")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    try:
        asked = matching(args.contenders) if args.contenders else None
        for tree in args.trees or []:
            shapes(tree)
    except ValueError as error:
        parser.error(str(error))
    args.jobs = []
    for section in args.sections:
        plan = PLAN[section]
        for tree in args.trees or plan:
            if section == "growth" and not tree.startswith(LEAF):
                continue
            names = asked or plan.get(tree) or list(CONTENDERS)
            args.jobs.append((section, tree, [n for n in names if _fits_section(section, n)]))
    if not any(names for *_, names in args.jobs):
        parser.error(
            "nothing to measure: growth needs leaves as --trees, eager optimizers of Optax, "
            "compile something that compiles"
        )
    return args


def _fits_section(section: str, name: str) -> bool:
    contender = CONTENDERS[name]
    return {"eager": contender.eager, "compile": contender.compiles}.get(section, True)


def command(args: argparse.Namespace) -> str:
    """The command as one would type it, without the output path."""
    flags = os.environ.get("XLA_FLAGS")
    words = [f"XLA_FLAGS={flags}"] if flags else []
    words += ["python", "benchmarks/speed.py"]
    if args.sections != list(PLAN):
        words += ["--sections", *args.sections]
    for flag in ("trees", "contenders"):
        words += [f"--{flag}", *getattr(args, flag)] if getattr(args, flag) else []
    words += ["--rounds", str(args.rounds)] if args.rounds != 30 else []
    return shlex.join(words)


def measured(section: str, tree: str, names: list[str], rounds: int) -> Iterator[results.Row]:
    """A row per contender, with figures or with "skipped" and the reason."""
    pending = []
    for name in names:
        why = CONTENDERS[name].missing()
        if why:
            yield {"contender": name, "skipped": why}
        else:
            pending.append(name)
    if section in ("compile", "memory"):
        for name in pending:
            yield _cold(section, tree, name)
        return
    limits = {"budget": _BUDGET, "rounds": rounds}
    while pending:
        try:
            for row in rows_of({"section": section, "tree": tree, "contenders": pending, **limits}):
                pending.remove(row["contender"])
                yield row
        except RuntimeError as error:
            # The process is gone, and the reference with it: the others get a new one.
            yield {"contender": pending.pop(0), "skipped": str(error)}


def _cold(section: str, tree: str, name: str) -> results.Row:
    """One row from fresh processes; several if they are quick, because compile times vary."""
    job = {"section": section, "tree": tree, "contenders": [name]}
    rows = []
    try:
        for _ in range(_REPEATS_COMPILE if section == "compile" else 1):
            begin = time.perf_counter()
            rows += rows_of(job)
            if time.perf_counter() - begin > _QUICK:
                break
    except RuntimeError as error:
        return {"contender": name, "skipped": str(error)}
    if section == "memory":
        return rows[0]
    stages = {stage: quartiles([row[stage] for row in rows]) for stage in ("trace", "compile")}
    return {"contender": name, **stages, "processes": len(rows)}


def summary(section: str, tree: str, rows: list[results.Row]) -> Table:
    """A table of what was just measured, for the terminal."""
    figures = ("ratio", "seconds", "trace", "compile", "state_bytes", "peak_bytes")
    shown = [figure for figure in figures if any(figure in row for row in rows)]
    table = Table(title=f"{section}, {tree}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    for figure in shown:
        table.add_column(figure.replace("_bytes", ", bytes per parameter"), justify="right")
    for row in rows:
        if "skipped" in row:
            table.add_row(row["contender"], f"skipped: {row['skipped']}", style="dim")
            continue
        values = [row.get(figure) for figure in shown]
        values = [value["median"] if isinstance(value, dict) else value for value in values]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        table.add_row(row["contender"], *cells)
    return table


def main(argv: list[str] | None = None) -> None:
    """Measures what the command line asks for, and writes each row at once."""
    args = parse(argv)
    console = Console()
    found = results.load(args.output)
    (device,) = rows_of({"section": "machine"})
    run = results.add_run(
        found,
        {
            "command": command(args),
            "date": datetime.date.today().isoformat(),
            "machine": results.machine() | device,
            # Of the minute before: on a busy machine the figures are worth little.
            "load": round(psutil.getloadavg()[0], 2),
            "versions": results.versions(),
        },
    )
    total = sum(len(names) for *_, names in args.jobs)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        for section, tree, names in args.jobs:
            rows = []
            bar.update(task, description=f"{section}, {tree}")
            for row in measured(section, tree, names, args.rounds):
                rows.append({"run": run, "tree": tree, **row})
                results.merge(found, section, rows)
                results.write(args.output, found)
                bar.update(task, advance=1, description=f"{section}, {tree}: {row['contender']}")
            console.print(summary(section, tree, rows))


if __name__ == "__main__":
    main()
