"""The step compiled for TPUs and GPUs that need not be there.

Compiles every format and rounding, on one leaf and on trees of models, for each chip. Nothing runs.
The same versions give the same programs; only compile times differ. It needs an environment of its
own, which `make accelerators` creates. Run it with

    python benchmarks/accelerators.py             # hours; writes results/accelerators.json
    python benchmarks/accelerators.py --check     # one leaf; fails if a target is missed

Each job runs in a process of its own, for ten minutes at most, and the file is written after each
job. An interrupted run can be resumed as long as the package and the versions are the same; if they
have changed, all jobs run again. `accelerators_page.py` renders the results.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chips
import compiled_code
import results
import targets
import trees

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "accelerators.json"
LIMIT = 600  # seconds per job
COMPILERS = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-pjrt",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvdisasm",
    "optax",
)
LEAF = targets.LEAF
ROWS = targets.ROWS


class Job(NamedTuple):
    """A row to compile, for a tree and a chip."""

    tree: str
    row: str
    chip: str


_MANY = ("optax float32", "float32, float32", "float32, bfloat16", "float32, uint8")
TREES = (LEAF, "gpt2-small", "resnet-50", "resnet-50-hwio", "nvae-cifar10")


def plan(only: Sequence[str], kinds: Sequence[str], names: Sequence[str]) -> list[Job]:
    """All jobs for some rows, chips and trees. For the CPU only the compile time is recorded."""
    return [
        Job(tree, row, chip)
        for tree in names
        for chip in kinds
        for row in ROWS
        if all(word in row for word in only)
        and (chip != "CPU" or tree == "gpt2-small")
        and (tree != "nvae-cifar10" or row in _MANY)
    ]


def shapes(tree: str) -> list[tuple[int, ...]]:
    """Shapes of the leaves of a tree."""
    return [(4096, 8192)] if tree == LEAF else list(trees.shapes(tree).values())


def arguments(row: targets.Row, leaves: list[tuple[int, ...]], chip: str) -> tuple[Any, Any, Any]:
    """Abstract parameters, state and gradients, on a chip."""
    import jax

    on = jax.sharding.SingleDeviceSharding(chips.device(chip))
    params = [jax.ShapeDtypeStruct(shape, row.dtype) for shape in leaves]
    state = jax.eval_shape(row.optimizer().init, params)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), (params, state, params)
    )


def compiled(row: targets.Row, leaves: list[tuple[int, ...]], chip: str) -> tuple[Any, float]:
    """The compiled step for a chip, and the processor seconds to trace and compile it."""
    import jax
    import optax

    optimizer = row.optimizer()

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    abstract = arguments(row, leaves, chip)
    begin = time.process_time()
    program = jax.jit(step, donate_argnums=(0, 1)).lower(*abstract).compile()
    return program, time.process_time() - begin


def _size(tree: Any) -> int:
    import jax

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def figures(job: Job, dump: Path | None = None) -> dict[str, Any]:
    """Figures of a compiled step: bytes, bundles and cycles per parameter, kernels per leaf."""
    row, leaves = ROWS[job.row], shapes(job.tree)
    params, state, grads = arguments(row, leaves, job.chip)
    program, seconds = compiled(row, leaves, job.chip)
    found: dict[str, Any] = {"seconds": round(seconds, 2)}
    if job.chip == "CPU":
        return found
    n = sum(x.size for x in params)
    text = program.as_text()
    moved = compiled_code.traffic(text)
    least = 2 * _size((params, state)) + _size(grads)
    large = sum(x.size * least / n > compiled_code.LARGE for x in params)
    found |= {
        "least": round(least / n, 3),
        "bytes": round(moved.bytes / n, 3),
        "kernels": round(moved.kernels / large, 2),
        "temporaries": round(program.memory_analysis().temp_size_in_bytes / n, 3),
    }
    if job.chip in chips.TPUS:
        found["cycles"] = round(compiled_code.cycles(text) / n, 5)
        if dump is not None:
            issued = compiled_code.bundles(text, dump)
            found["bundles"] = issued and round(issued / n, 5)
    elif job.tree == LEAF and moved.kernels == 1:
        import gpu_code

        found["instructions"] = round(gpu_code.instructions(program, _size((params, state)) / n), 1)
    return found


def source() -> str:
    """A hash of the package, except for the code that runs on CPUs alone."""
    files = sorted((HERE.parent / "src").rglob("*.py"))
    files = [path for path in files if path.name != "_cpu.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def run_one(job: Job) -> dict[str, Any]:
    """Figures of a job in this process, after a first compilation to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) if job.tree == LEAF and job.chip in chips.TPUS else None
        chips.prepare(dump)
        compiled(ROWS["optax float32"], [(8, 128)], job.chip)
        for path in Path(folder).iterdir():
            path.unlink()
        return figures(job, dump)


def run(job: Job) -> dict[str, Any]:
    """Figures of a job in a process of its own, or the reason why there are none."""
    begin = time.monotonic()
    try:
        process = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps(job)],
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"did not compile within {LIMIT / 60:g} minutes"}
    if process.returncode < 0:
        return {"skipped": f"its process was killed after {time.monotonic() - begin:.0f} s"}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["no message"]
        return {"skipped": f"failed: {lines[-1][:100]}"}
    return json.loads(process.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    """Versions of the compilers."""
    return {name: version for name, version in results.versions(COMPILERS).items() if version}


def measure(jobs: Iterable[Job], path: Path) -> Iterator[dict[str, Any]]:
    """Runs the jobs that are not in the file yet, and writes the file after each."""
    now = {"versions": versions(), "source": source()}
    old = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get(key) == value for key, value in now.items())
    found: Any = now | {"rows": old["rows"] if same else []}
    have = {(row["tree"], row["row"], row["chip"]) for row in found["rows"]}
    order = {job: i for i, job in enumerate(plan((), list(chips.CHIPS), TREES))}
    for job in jobs:
        if job not in have:
            row = job._asdict() | run(job)
            found["rows"].append(row)
            found["rows"].sort(key=lambda row: order[Job(row["tree"], row["row"], row["chip"])])
            results.write(path, found)
            yield row


def check(jobs: Iterable[Job]) -> list[str]:
    """Runs jobs in this process; returns a message for each missed target."""
    chips.prepare()
    rows = [job._asdict() | figures(job) for job in jobs]
    return [found.refusal() for found in targets.findings(rows) if not found.held]


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles, checks or reports, as the command line says."""
    parser = argparse.ArgumentParser(description="Compile the step for accelerators.")
    parser.add_argument("--check", action="store_true", help="one leaf, against the targets")
    parser.add_argument("--kinds", nargs="+", choices=chips.CHIPS, default=list(chips.CHIPS))
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--only", nargs="+", default=(), help="words in the names of rows")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job:
        print(json.dumps(run_one(Job(*json.loads(args.job)))))
        return
    if args.check:
        begin = time.monotonic()
        jobs = plan(args.only, args.kinds, [LEAF])
        refusals = check(jobs)
        print(*refusals, f"{len(jobs)} steps, {time.monotonic() - begin:.0f} s", sep="\n")
        sys.exit(f"{len(refusals)} targets missed" if refusals else 0)
    for row in measure(plan(args.only, args.kinds, args.trees), args.json):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
