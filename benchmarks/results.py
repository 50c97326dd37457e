"""Files of results: rows of figures, each with the run that measured it.

{"runs": {"1": {"command", "date", "machine", "load", "versions"}},
 "step": [{"run", "tree", "contender", ...figures, or "skipped": why}], "eager": [...], ...}
"""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

SECTIONS = ("step", "eager", "compile", "memory", "growth")
_PACKAGES = (
    "adamaxw",
    "jax",
    "jaxlib",
    "optax",
    "numpy",
    "keras",
    "torch",
    "pytorch_optimizer",
)

Row = dict[str, Any]
Results = dict[str, Any]


def load(path: Path) -> Results:
    """The results so far, if any."""
    return json.loads(path.read_text()) if path.exists() else {"runs": {}}


def write(path: Path, found: Results) -> None:
    """Writes JSON that diffs well: each item of a list, or of a dict of dicts, on its own line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in found.items():
        text = json.dumps(value)
        if value and isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"
        elif value and isinstance(value, dict) and all(isinstance(x, dict) for x in value.values()):
            lines = (f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
            text = "{\n" + ",\n".join(lines) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def add_run(results: Results, run: dict[str, Any]) -> str:
    """Adds a run; returns its key, for the rows that it measures."""
    key = str(1 + max((int(key) for key in results["runs"]), default=0))
    results["runs"][key] = run
    return key


def merge(results: Results, section: str, rows: list[Row]) -> None:
    """Replaces rows of the same tree and contender, and drops runs without rows."""
    kept = {_key(row): row for row in results.get(section, [])}
    results[section] = list((kept | {_key(row): row for row in rows}).values())
    used = {row["run"] for name in SECTIONS for row in results.get(name, [])}
    results["runs"] = {key: run for key, run in results["runs"].items() if key in used}


def _key(row: Row) -> tuple[str, str]:
    return row["tree"], row["contender"]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, to five digits."""
    low, median, high = (
        statistics.quantiles(values, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    )
    return {
        key: float(f"{value:.5g}")
        for key, value in (("median", median), ("low", low), ("high", high))
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str | None]:
    """Versions of Python and of packages; None for those that are not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    return {
        "cpu": _cpu(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }


def _cpu() -> str:
    """The model of the processor, which `platform` does not report on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()
