"""Training that goes on where it was stopped, however it was stopped, to the same last bit.

A classifier of the 8x8 digits of scikit-learn, with bfloat16 parameters and 2 bytes of state a
parameter. Orbax saves every few steps. The same command again goes on from the last complete
checkpoint, also after `kill -9` in the middle of saving, and ends with the parameters of a run that
nothing stopped. Start it, stop it at any moment, and start it again::

    python examples/resume.py

The folder is for one run: others in it with numbers for names are taken for its checkpoints.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import OPTIMIZERS, Parser, integer_in
from orbax.checkpoint import v1 as ocp
from sklearn.datasets import load_digits

import adamaxw

BATCH = 64
KEEP = 3  # checkpoints


class Run(NamedTuple):
    """All that a later step depends on, besides the flags: what is saved.

    Attributes:
        params: the parameters.
        state: that of the optimizer. The count of steps is in it, and the noise of its rounding is
            a function of that count: no key has to be saved.
    """

    params: Any
    state: Any


def first(optimizer: optax.GradientTransformation, key: jax.Array) -> Run:
    """The run before its first step."""
    keys = jax.random.split(key)
    params = {
        "hidden": {"w": jax.random.normal(keys[0], (64, 256)) / 8, "b": jnp.zeros(256)},
        "logits": {"w": jax.random.normal(keys[1], (256, 10)) / 16, "b": jnp.zeros(10)},
    }
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    return Run(params, optimizer.init(params))


def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of images, float32 of shape (images, 64), in nats."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    hidden = jax.nn.relu(images @ params["hidden"]["w"] + params["hidden"]["b"])
    logits = hidden @ params["logits"]["w"] + params["logits"]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def batch_of(data: Any, key: jax.Array, step: Any) -> Any:
    """The minibatch of a step: a function of the step, so that no place in the data is saved."""
    size = len(data[0])
    steps = size // BATCH
    order = jax.random.permutation(jax.random.fold_in(key, step // steps), size)
    chosen = jax.lax.dynamic_slice_in_dim(order, step % steps * BATCH, BATCH)
    return jax.tree.map(lambda x: x[chosen], data)


# Donated: parameters and state are updated where they are. What Orbax saves, it has copied.
@partial(jax.jit, static_argnames="optimizer", donate_argnames="run")
def train_step(run: Run, optimizer: Any, data: Any, key: jax.Array, step: Any) -> Run:
    """One update, on the minibatch of the step; 0 is the first."""
    grads = jax.grad(loss)(run.params, *batch_of(data, key, step))
    updates, state = optimizer.update(grads, run.state, run.params)
    return Run(optax.apply_updates(run.params, updates), state)


def checksum(tree: Any) -> str:
    """A hash of every bit of a tree of arrays, with their names and dtypes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def restore(checkpoints: ocp.training.Checkpointer, abstract: Run, flags: dict[str, Any]) -> Run:
    """The latest checkpoint.

    Args:
        checkpoints: a folder with at least one.
        abstract: shapes, dtypes and shardings of the run.
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


def main(argv: Sequence[str] | None = None) -> int:
    """Trains from the last checkpoint to the end; returns the exit status."""
    parser = Parser(
        "Training that goes on where it was stopped.",
        learning_rate=0.003,
        weight_decay=0.01,
        output="output/resume",
    )
    parser.add_low_precision()
    parser.set_defaults(moments="uint8", rounding="stochastic")
    parser.add_argument("--steps", type=integer_in(1, 10**6), default=2000, help="in all")
    parser.add_argument("--save-every", type=integer_in(1, 10**6), default=100, help="steps")
    args = parser.parse_args(argv)
    parser.folder(args.output)
    optimizer = OPTIMIZERS[args.optimizer](
        optax.linear_schedule(0.0, args.learning_rate, 100),
        weight_decay=args.weight_decay,
        mask=adamaxw.masks.matrices,
        **parser.low_precision(args),
    )
    # What steps depend on. Other flags may change from one start to the next.
    changing = ("steps", "save_every", "output")
    flags = {name: value for name, value in vars(args).items() if name not in changing}

    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    init = jax.jit(
        partial(first, optimizer, init_key),
        out_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    latest_ones: Any = ocp.training.preservation_policies.LatestN(KEEP)
    # Orbax writes to a temporary folder, and renames it when all is there: a folder with a number
    # for its name is complete. What a killed run has left of others is removed.
    with ocp.training.Checkpointer(
        args.output.absolute(), preservation_policy=latest_ones, cleanup_tmp_directories=True
    ) as checkpoints:
        if checkpoints.latest is None:
            start, run = 0, init()
            print("begins anew", flush=True)
        else:
            start = checkpoints.latest.step
            if start > args.steps:
                parser.error(f"argument --steps: {args.output} is at step {start} already")
            try:
                # From shapes and places alone: nothing is allocated before.
                run = restore(checkpoints, init.eval_shape(), flags)
            except ValueError as error:
                parser.fail(str(error))
            print(f"goes on from step {start}", flush=True)
        for step in range(start, args.steps):
            run = train_step(run, optimizer, data, data_key, step)
            done = step + 1
            if done % args.save_every == 0 or done == args.steps:
                about: Any = {"flags": flags, "step": done, "checksum": checksum(run)}
                checkpoints.save(done, run, force=True, custom_metadata=about)
                print(f"saved step {done}", flush=True)
    final = float(loss(run.params, *data))
    if not math.isfinite(final):
        parser.fail("diverged; try another --learning-rate, with another --output")
    print(f"loss {final:.4f}, checksum {checksum(run)[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
