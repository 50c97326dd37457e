"""Checkpoints from which the same command resumes, in one process or several.

Orbax writes to a temporary folder and renames it once everything is there, so a folder named by a
number is complete. Flipped bits and checkpoints of other flags, which Orbax does not notice, are
found here, by a checksum and the flags stored beside each checkpoint.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from command_line import Parser
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

KEEP = 3  # checkpoints


def checksum(tree: Any) -> str:
    """A hash of every bit of a tree of arrays, and of their names and dtypes.

    Gathers arrays that are spread over several processes, all of which must then call this.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(_whole(leaf).tobytes())
    return digest.hexdigest()


def _whole(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def opened(folder: Path) -> ocp.training.Checkpointer:
    """The checkpoints in a folder; removes what a killed run has left half written."""
    latest_ones: Any = ocp.training.preservation_policies.LatestN(KEEP)
    return ocp.training.Checkpointer(
        str(folder.absolute()), preservation_policy=latest_ones, cleanup_tmp_directories=True
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, run: Any, flags: Any) -> None:
    """Saves a run after some number of steps, and reports it once it is complete."""
    about: Any = {"flags": flags, "step": step, "checksum": checksum(run)}
    checkpoints.save(step, run, force=True, custom_metadata=about)
    say(f"saved step {step}")


def begin(
    checkpoints: ocp.training.Checkpointer, init: Any, steps: int, flags: Any, parser: Parser
) -> tuple[int, Any]:
    """Resumes from the latest checkpoint, or starts; returns the steps done so far, and the run.

    Args:
        checkpoints: the folder to look in.
        init: the compiled function, with `out_shardings`, that makes the run if there is none.
        steps: the total number of steps.
        flags: the flags that steps depend on.
        parser: ends the program if the checkpoint is damaged or does not fit.
    """
    if checkpoints.latest is None:
        say("starting from step 0")
        return 0, init()
    step = checkpoints.latest.step
    if step > steps:
        parser.error(f"argument --steps: {checkpoints.directory} is at step {step} already")
    try:
        # From shapes and shardings alone: nothing else is allocated.
        run = restore(checkpoints, init.eval_shape(), flags)
    except ValueError as error:
        parser.fail(str(error))
    say(f"resuming from step {step}")
    return step, run


def restore(checkpoints: ocp.training.Checkpointer, abstract: Any, flags: dict[str, Any]) -> Any:
    """The latest checkpoint.

    Args:
        checkpoints: a folder with at least one.
        abstract: shapes, dtypes and shardings of the run; the saved shardings may differ.
        flags: the flags that it must have been saved with.

    Raises:
        ValueError: it was saved with other flags, or is damaged. Whether to fall back to an older
            one or to start again is for the user to decide.
    """
    assert checkpoints.latest is not None
    step = checkpoints.latest.step
    place = checkpoints.directory / str(step)

    def damaged(why: str) -> ValueError:
        return ValueError(
            f"{place} is damaged or cannot be read ({why}): move it away to resume from the "
            "checkpoint before it, or pass another --output to start again"
        )

    try:
        saved: Any = checkpoints.metadata(step).custom_metadata
        passed = saved["flags"]
    # Damage makes Orbax raise almost any exception.
    except Exception as error:
        raise damaged(type(error).__name__) from error
    if passed != flags:
        words = (f"--{name.replace('_', '-')} {value}" for name, value in passed.items())
        raise ValueError(
            f"{place} was saved with {' '.join(words)}: pass the same, or another --output"
        )
    try:
        run = checkpoints.load(step, abstract)
    except Exception as error:
        raise damaged(type(error).__name__) from error
    # Orbax does not notice flipped bits, and casts to whatever dtypes it is asked for.
    if checksum(run) != saved["checksum"]:
        raise damaged("its checksum differs")
    if step != saved["step"]:
        raise damaged(f"it was saved as step {saved['step']}")
    return run


def say(line: str) -> None:
    """Prints a line without buffering, in the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)
