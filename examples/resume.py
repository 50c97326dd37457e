"""Training that can be killed at any moment and resumed without losing a bit.

A classifier of scikit-learn's 8x8 digits, with bfloat16 parameters and 2 bytes of state per
parameter. Orbax saves a checkpoint every few steps. The same command resumes from the last complete
one, even after `kill -9` in the middle of saving, and ends with the parameters of an uninterrupted
run. Start it, stop it at any moment, and start it again::

    python examples/resume.py

The output folder belongs to one run: any folder in it named by a number is taken for a checkpoint.
"""

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import checkpoints
import jax
import jax.numpy as jnp
import optax
from command_line import OPTIMIZERS, Parser, integer_in
from sklearn.datasets import load_digits

import adamaxw

BATCH = 64


class Run(NamedTuple):
    """What is saved: everything that later steps depend on, besides the flags.

    Attributes:
        params: the parameters.
        state: the optimizer's state. It counts the steps, and the noise of its rounding is a
            function of that count, so no key has to be saved.
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
    """The minibatch of a step, a function of the step alone: no position in the data is saved."""
    size = len(data[0])
    steps = size // BATCH
    order = jax.random.permutation(jax.random.fold_in(key, step // steps), size)
    chosen = jax.lax.dynamic_slice_in_dim(order, step % steps * BATCH, BATCH)
    return jax.tree.map(lambda x: x[chosen], data)


# Donated, so that parameters and state are updated in place. Orbax copies before it saves.
@partial(jax.jit, static_argnames="optimizer", donate_argnames="run")
def train_step(run: Run, optimizer: Any, data: Any, key: jax.Array, step: Any) -> Run:
    """One update, on the minibatch of the step, counted from 0."""
    grads = jax.grad(loss)(run.params, *batch_of(data, key, step))
    updates, state = optimizer.update(grads, run.state, run.params)
    return Run(optax.apply_updates(run.params, updates), state)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains from the last checkpoint to the end; returns the exit status."""
    parser = Parser(
        "Training that can be killed and resumed.",
        learning_rate=0.003,
        weight_decay=0.01,
        output="output/resume",
    )
    parser.add_low_precision()
    parser.set_defaults(moments="uint8", rounding="stochastic")
    parser.add_argument("--steps", type=integer_in(1, 10**6), default=2000, help="in total")
    parser.add_argument("--save-every", type=integer_in(1, 10**6), default=100, help="steps")
    args = parser.parse_args(argv)
    parser.folder(args.output)
    optimizer = OPTIMIZERS[args.optimizer](
        optax.linear_schedule(0.0, args.learning_rate, 100),
        weight_decay=args.weight_decay,
        mask=adamaxw.masks.matrices,
        **parser.low_precision(args),
    )
    # Steps depend on all flags but these, which may change from one start to the next.
    changing = ("steps", "save_every", "output")
    flags = {name: value for name, value in vars(args).items() if name not in changing}

    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    init = jax.jit(
        partial(first, optimizer, init_key),
        out_shardings=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    with checkpoints.opened(args.output) as folder:
        start, run = checkpoints.begin(folder, init, args.steps, flags, parser)
        for step in range(start, args.steps):
            run = train_step(run, optimizer, data, data_key, step)
            done = step + 1
            if done % args.save_every == 0 or done == args.steps:
                checkpoints.save(folder, done, run, flags)
    final = float(loss(run.params, *data))
    if not math.isfinite(final):
        parser.fail("diverged; try another --learning-rate, with another --output")
    print(f"loss {final:.4f}, checksum {checkpoints.checksum(run)[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
