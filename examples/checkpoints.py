"""Checkpoints of a run from which the same command goes on, in one process or several.

Orbax writes to a temporary folder, and renames it when all is there: a folder with a number for its
name is complete. What it does not notice, a flipped bit or a checkpoint of other flags, is noticed
here, by a checksum and the flags beside each.
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
    """A hash of every bit of a tree of arrays, with their names and dtypes.

    Of arrays on the devices of several processes, all must call it: the parts are gathered.
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
    """The checkpoints in a folder, without what a killed run has left of others."""
    latest_ones: Any = ocp.training.preservation_policies.LatestN(KEEP)
    return ocp.training.Checkpointer(
        str(folder.absolute()), preservation_policy=latest_ones, cleanup_tmp_directories=True
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, run: Any, flags: Any) -> None:
    """Saves a run after so many steps, and says so when all of it is there."""
    about: Any = {"flags": flags, "step": step, "checksum": checksum(run)}
    checkpoints.save(step, run, force=True, custom_metadata=about)
    say(f"saved step {step}")


def begin(
    checkpoints: ocp.training.Checkpointer, init: Any, steps: int, flags: Any, parser: Parser
) -> tuple[int, Any]:
    """The run to go on with, and the steps that it has done; says which.

    Args:
        checkpoints: where the latest is looked for.
        init: the compiled function, with `out_shardings`, that makes the run if there is none.
        steps: that are to be done in all.
        flags: those that steps depend on.
        parser: ends the program if a checkpoint does not fit, or is damaged.
    """
    if checkpoints.latest is None:
        say("begins anew")
        return 0, init()
    step = checkpoints.latest.step
    if step > steps:
        parser.error(f"argument --steps: {checkpoints.directory} is at step {step} already")
    try:
        # From shapes and places alone: nothing is allocated before.
        run = restore(checkpoints, init.eval_shape(), flags)
    except ValueError as error:
        parser.fail(str(error))
    say(f"goes on from step {step}")
    return step, run


def restore(checkpoints: ocp.training.Checkpointer, abstract: Any, flags: dict[str, Any]) -> Any:
    """The latest checkpoint.

    Args:
        checkpoints: a folder with at least one.
        abstract: shapes, dtypes and shardings of the run; those of the saved one may differ.
        flags: those that it must have been saved with.

    Raises:
        ValueError: it was saved with others, or is damaged. An older one is not taken in its place,
            nor is training begun anew: that is for the user to decide.
    """
    assert checkpoints.latest is not None
    step = checkpoints.latest.step
    place = checkpoints.directory / str(step)

    def damaged(why: str) -> ValueError:
        return ValueError(
            f"{place} is damaged or cannot be read ({why}): move it away to go on from the "
            "checkpoint before it, or pass another --output to begin anew"
        )

    try:
        saved: Any = checkpoints.metadata(step).custom_metadata
        passed = saved["flags"]
    # Of what is damaged, Orbax raises almost anything.
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
    # Orbax does not notice a flipped bit, and casts to whatever dtypes it is asked for.
    if checksum(run) != saved["checksum"]:
        raise damaged("its checksum differs")
    if step != saved["step"]:
        raise damaged(f"it was saved as step {saved['step']}")
    return run


def say(line: str) -> None:
    """Prints a line at once, in the first process."""
    if jax.process_index() == 0:
        print(line, flush=True)
