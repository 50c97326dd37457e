"""Kills processes of `examples/distributed.py`, and checks that nothing is lost.

Like `kills.py`, but SIGKILL hits one process of a job, drawn at random like the moment, including
the one that coordinates the others. The job must then end by itself, with a line that says so and
without leaving a process behind, and the same command must resume. Run it with

    python benchmarks/worker_kills.py    # kills up to 28 times, writes results/worker_kills.json
"""

import argparse
import importlib.metadata
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kills
import psutil
import results
from versions import versions

RESULTS = kills.HERE / "results" / "worker_kills.json"
PROGRAM = kills.HERE.parent / "examples" / "distributed.py"
STEPS, SAVE_EVERY = 240, 4
RUNS = ((2, 10), (2, 10), (4, 8))  # processes, and kills at most


def kill_worker(launcher: Any, rng: random.Random) -> None:
    """Kills one process of a job, and waits until the others have ended.

    Raises:
        RuntimeError: the launcher is gone, and a process of its job is not.
    """
    count = int(re.findall(r"--processes (\d+)", " ".join(launcher.args))[0])
    chosen = rng.randrange(count)
    workers: list[psutil.Process] = []
    while len(workers) < count:
        if launcher.poll() is not None:
            return
        workers = psutil.Process(launcher.pid).children()
        time.sleep(0.001)
    workers[chosen].kill()
    launcher.wait(kills.PATIENCE)
    _, left = psutil.wait_procs(workers, timeout=1)
    if left:
        raise RuntimeError(f"left behind: {left}")


def job(processes: int) -> kills.Program:
    """A job of some number of processes, with one CPU device each."""
    flags = ["--processes", str(processes), "--devices", "1"]
    line = (
        rf"distributed\.py: error: process \d of {processes} was killed by SIGKILL; "
        "run the same command again to resume from the last complete checkpoint"
    )
    return kills.Program(
        [sys.executable, str(PROGRAM), *flags], SAVE_EVERY, 6, 20.0, kill_worker, 1, line
    )


def summary(totals: dict[str, Any]) -> str:
    """The results in one line."""
    return (
        "{kills} kills of one process, {while_writing} of them with a checkpoint half written: "
        "{losses} losses; the job ended {longest_seconds} s later at most".format(**totals)
    )


def main() -> None:
    """Kills, prints what was lost, and writes the results."""
    parser = argparse.ArgumentParser(description="Kill processes of examples/distributed.py.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write")
    args = parser.parse_args()
    # Most of a start is compilation.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    runs, ends = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for processes in sorted({processes for processes, _ in RUNS}):
            (folder / f"undisturbed {processes}").mkdir()
            ends[processes] = kills.undisturbed(
                folder / f"undisturbed {processes}", STEPS, job(processes)
            )
        for seed, (processes, number) in enumerate(RUNS):
            (folder / str(seed)).mkdir()
            survival = kills.killed(folder / str(seed), number, seed, STEPS, job(processes))
            runs.append(
                {
                    "seed": seed,
                    "processes": processes,
                    "kills": survival.kills,
                    "while_writing": survival.while_writing,
                    "restarts": survival.restarts,
                    "seconds": [round(seconds, 2) for seconds in survival.seconds],
                    "losses": kills.losses(survival, ends[processes]),
                }
            )
    totals = {key: sum(run[key] for run in runs) for key in ("kills", "while_writing")}
    totals["losses"] = sum(len(run["losses"]) for run in runs)
    totals["longest_seconds"] = max(seconds for run in runs for seconds in run["seconds"])
    orbax = importlib.metadata.version("orbax-checkpoint")
    found = {
        "command": "python benchmarks/worker_kills.py",
        "versions": f"orbax-checkpoint {orbax}, {versions()}",
        "machine": results.machine(),
        "undisturbed": {f"{processes} processes": end for processes, end in ends.items()},
        "totals": totals,
        "runs": runs,
    }
    results.write(args.results, found)
    print(summary(totals))
    sys.exit(totals["losses"] > 0)


if __name__ == "__main__":
    main()
