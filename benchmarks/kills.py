"""Kills `examples/resume.py` at random moments, and checks that nothing is lost.

Starts the example, kills its process group with SIGKILL, and starts it again, until it has been
killed as often as asked; the last start runs to the end. Moments are random: while a checkpoint is
being written, as its temporary folder shows, while an old one is being deleted, or at any time from
the start of Python. Each restart must resume from the last step reported as saved or a later one,
and the run must end with the parameters of an uninterrupted run. Run it with

    python benchmarks/kills.py    # kills up to 40 times, writes results/kills.json
"""

import argparse
import importlib.metadata
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import results
from versions import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kills.json"
PROGRAM = HERE.parent / "examples" / "resume.py"
STEPS, SAVE_EVERY = 2000, 10
# Seconds for a process to end.
PATIENCE = 300


def kill_group(process: Any, rng: random.Random) -> None:
    """Kills a process and everything it has started."""
    del rng
    os.killpg(process.pid, signal.SIGKILL)


class Program(NamedTuple):
    """The program to kill.

    Attributes:
        command: to which `--steps`, `--save-every` and `--output` are added.
        save_every: steps.
        max_saves: the most saves to wait for before a kill.
        start_up: seconds within which a kill at any time falls.
        kill: kills the process, or a random part of it.
        status: the exit status after that.
        last_line: a regular expression of the last line then printed; None for any.
    """

    command: list[str]
    save_every: int
    max_saves: int
    start_up: float
    kill: Callable[[Any, random.Random], None]
    status: int
    last_line: str | None


RESUME = Program(
    [sys.executable, str(PROGRAM)], SAVE_EVERY, 12, 8.0, kill_group, -signal.SIGKILL, None
)


class Survival(NamedTuple):
    """The outcome of a run that was killed and restarted.

    Attributes:
        kills: how many.
        restarts: for each, the last step reported as saved, and the step it resumed from.
        while_writing: how many kills left a checkpoint half written.
        while_deleting: how many left one half deleted.
        end: the last line of the run, with its checksum.
        seconds: from each kill until the process had ended.
    """

    kills: int
    restarts: list[tuple[int, int]]
    while_writing: int
    while_deleting: int
    end: str
    seconds: list[float]


def undisturbed(folder: Path, steps: int = STEPS, program: Program = RESUME) -> str:
    """The last line of an uninterrupted run in an empty folder."""
    return killed(folder, 0, 0, steps, program).end


def killed(
    folder: Path, kills: int, seed: int, steps: int = STEPS, program: Program = RESUME
) -> Survival:
    """Kills and restarts a run.

    Args:
        folder: for its checkpoints and what it prints; empty.
        kills: how often; fewer if it ends before.
        seed: of the moments.
        steps: of the run.
        program: what is run.

    Raises:
        RuntimeError: it failed without being killed; with the end of what it printed.
    """
    rng = random.Random(seed)
    checkpoints = folder / "checkpoints"
    restarts, left, safe, seconds = [], Counter(), 0, []
    for start in range(kills + 1):
        log = folder / f"{start}.txt"
        before = _half_done(checkpoints)
        process = _start(program, checkpoints, log, steps)
        try:
            if start == kills:
                process.wait(PATIENCE)
            else:
                _wait_for_moment(program, process, checkpoints, rng)
                began = time.monotonic()
                if process.poll() is None:
                    program.kill(process, rng)
                process.wait(PATIENCE)
                seconds.append(time.monotonic() - began)
        finally:
            if process.poll() is None:
                kill_group(process, rng)
        status = process.wait(PATIENCE)
        # Complete lines only.
        lines = log.read_text().split("\n")[:-1]
        if not (status == 0 or (status == program.status and _is_expected(program, lines))):
            end = "\n".join(lines)[-2000:]
            raise RuntimeError(f"seed {seed}, start {start}: status {status}: {end}")
        for line in lines:
            if found := re.fullmatch(r"resuming from step (\d+)", line):
                restarts.append((safe, int(found[1])))
            elif line == "starting from step 0":
                restarts.append((safe, 0))
            elif found := re.fullmatch(r"saved step (\d+)", line):
                safe = int(found[1])
        if status == 0:
            return Survival(start, restarts, left["writing"], left["deleting"], lines[-1], seconds)
        left.update({how for how, _ in _half_done(checkpoints) - before})
    raise AssertionError("the last process is not killed, or there is an error")


def losses(survival: Survival, end: str) -> list[str]:
    """What was lost, in words; empty if nothing was."""
    lost = [
        f"resumed from step {step}, although step {safe} had been saved"
        for safe, step in survival.restarts
        if step < safe
    ]
    return lost if survival.end == end else [*lost, f"ended with {survival.end}, not {end}"]


def _is_expected(program: Program, lines: list[str]) -> bool:
    return program.last_line is None or bool(re.fullmatch(program.last_line, lines[-1]))


def _start(program: Program, checkpoints: Path, log: Path, steps: int) -> subprocess.Popen[Any]:
    flags = ["--steps", str(steps), "--save-every", str(program.save_every)]
    with log.open("w") as file:
        return subprocess.Popen(
            [*program.command, *flags, "--output", str(checkpoints)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_for_moment(program: Program, process: Any, checkpoints: Path, rng: random.Random) -> None:
    """Returns at a random moment, or when the process has ended."""
    how = rng.choices(("writing", "deleting", "any"), (6, 2, 2))[0]
    saves, delay = rng.randint(1, program.max_saves), rng.uniform(0, 0.08)
    if how == "any":
        saves, delay = 0, rng.uniform(0, program.start_up)
    goal = _latest(checkpoints) + saves * program.save_every
    _poll(process, lambda: _latest(checkpoints) >= goal)
    if how != "any":
        _poll(process, lambda: how in {half for half, _ in _half_done(checkpoints)})
    if how == "deleting":
        delay /= 20  # Deleting takes that much less time.
    until = time.monotonic() + delay
    _poll(process, lambda: time.monotonic() > until)


def _poll(process: Any, condition: Callable[[], bool]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.0005)


def _names(checkpoints: Path) -> list[str]:
    return os.listdir(checkpoints) if checkpoints.exists() else []


def _steps(checkpoints: Path) -> set[str]:
    return {name for name in _names(checkpoints) if name.isdecimal()}


def _latest(checkpoints: Path) -> int:
    return max(map(int, _steps(checkpoints)), default=0)


def _half_done(checkpoints: Path) -> set[tuple[str, str]]:
    """The folders that are half written or half deleted."""
    deleted = {
        ("deleting", name)
        for name in _steps(checkpoints)
        if not (checkpoints / name / "_CHECKPOINT_METADATA").exists()
    }
    return deleted | {("writing", name) for name in _names(checkpoints) if not name.isdecimal()}


def summary(totals: dict[str, int]) -> str:
    """The results in one line."""
    return (
        "{kills} kills, {while_writing} of them with a checkpoint half written, {while_deleting} "
        "with one half deleted: {losses} losses".format(**totals)
    )


def main() -> None:
    """Kills, prints what was lost, and writes the results."""
    parser = argparse.ArgumentParser(description="Kill the training of examples/resume.py.")
    parser.add_argument("--runs", type=int, default=4, help="each with a seed of its own")
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to write")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "undisturbed").mkdir()
        end = undisturbed(folder / "undisturbed")
        for seed in range(args.runs):
            (folder / str(seed)).mkdir()
            survival = killed(folder / str(seed), args.kills, seed)
            runs.append(
                {
                    "seed": seed,
                    "kills": survival.kills,
                    "while_writing": survival.while_writing,
                    "while_deleting": survival.while_deleting,
                    "restarts": survival.restarts,
                    "losses": losses(survival, end),
                }
            )
    totals = {
        key: sum(run[key] for run in runs) for key in ("kills", "while_writing", "while_deleting")
    }
    totals["losses"] = sum(len(run["losses"]) for run in runs)
    orbax = importlib.metadata.version("orbax-checkpoint")
    found = {
        "command": "python benchmarks/kills.py",
        "versions": f"orbax-checkpoint {orbax}, {versions()}",
        "machine": results.machine(),
        "undisturbed": end,
        "totals": totals,
        "runs": runs,
    }
    results.write(args.results, found)
    print(summary(totals))
    sys.exit(totals["losses"] > 0)


if __name__ == "__main__":
    main()
