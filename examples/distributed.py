"""Train a language model in several processes, and resume after one of them was killed.

The model and the data of `language_model.py`, on a mesh over the devices of all processes, joined
by `jax.distributed`. Parameters and state are both replicated (data), both sharded (fsdp), or only
the state is sharded (zero1). A checkpoint is saved every few steps. If a process dies, the job ends
with one line that says so. The same command resumes from the last complete checkpoint, even with
another number of processes or devices or another strategy. Run two processes with four CPU devices
each::

    python examples/distributed.py
    python examples/distributed.py --strategy fsdp --processes 4 --devices 2

or, on each of two machines that share the output folder, with I being 0 or 1::

    python examples/distributed.py --coordinator HOST:PORT --process I --devices 0
"""

import argparse
import math
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import checkpoints
import jax
import launcher
import numpy as np
import optax
from checkpoints import say
from command_line import OPTIMIZERS, Parser, integer_in
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from language_model import (
    Transformer,
    as_array,
    loss_fn,
    read_sources,
    sample_windows,
    split_sources,
)

import adamaxw
from adamaxw.sharding import bytes_a_device

WIDTH, LAYERS, CONTEXT = 64, 1, 64
WARMUP = 10  # steps
MAX_BYTES = 1_000_000
HELD_OUT = 64  # windows
HEARTBEAT = 30  # seconds of silence after which a process counts as lost, which ends the others
PATIENCE = 120  # seconds for all processes to join, and to leave
TO_RESUME = "run the same command again to resume from the last complete checkpoint"
# Flags that steps do not depend on, so that they may change from one start to the next.
CHANGING = (
    *("steps", "save_every", "output", "strategy"),
    *("processes", "devices", "coordinator", "process", "launched"),
)


class Run(NamedTuple):
    """What is saved: everything that later steps depend on, besides the flags."""

    params: Any
    state: Any


class Job(NamedTuple):
    """The compiled functions of a training run on one mesh.

    Attributes:
        init: makes the run, sharded from the start.
        step: maps (run, windows) to the loss before the update and the run after it.
        loss: maps (params, windows) to the loss.
        batch: maps the number of a step, from 0, to its windows.
        held_out: windows to evaluate on.
    """

    init: Any
    step: Callable[[Run, jax.Array], tuple[jax.Array, Run]]
    loss: Callable[[Any, jax.Array], jax.Array]
    batch: Callable[[int], jax.Array]
    held_out: jax.Array


def shardings_of(
    strategy: str, optimizer: optax.GradientTransformation, params: Any, mesh: jax.sharding.Mesh
) -> Run:
    """Shardings of the parameters, given by their shapes, and of the state."""

    def placed(p: Any) -> Any:
        spec = PartitionSpec()
        if strategy == "fsdp":
            divisible = [i for i, size in enumerate(p.shape) if size % mesh.size == 0]
            if divisible:
                spec = PartitionSpec(*[None] * divisible[0], "data")
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(placed, params)
    data_axis = "data" if strategy == "zero1" else ()
    state = adamaxw.sharding.of_state(optimizer, params, data_axis=data_axis)
    return Run(jax.tree.map(lambda p: p.sharding, params), state)


def make_job(
    args: argparse.Namespace,
    optimizer: optax.GradientTransformation,
    data: np.ndarray,
    held_out: np.ndarray,
) -> Job:
    """Prepares a training run on uint8 bytes; no parameters are allocated yet."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def make() -> Transformer:
        return Transformer(WIDTH, LAYERS, CONTEXT, args.dtype, nnx.Rngs(args.seed))

    graph, shapes = nnx.split(nnx.eval_shape(make))
    shardings = shardings_of(args.strategy, optimizer, shapes, mesh)

    @partial(jax.jit, out_shardings=shardings)
    def init() -> Run:
        params = nnx.state(make())
        return Run(params, optimizer.init(params))

    def loss_of(params: Any, windows: jax.Array) -> jax.Array:
        return loss_fn(nnx.merge(graph, params), windows)

    # Donated, so that parameters and state are updated in place. Orbax copies before it saves.
    @partial(jax.jit, out_shardings=(everywhere, shardings), donate_argnums=0)
    def step(run: Run, windows: jax.Array) -> tuple[jax.Array, Run]:
        loss, grads = jax.value_and_grad(loss_of)(run.params, windows)
        updates, state = optimizer.update(grads, run.state, run.params)
        return loss, Run(optax.apply_updates(run.params, updates), state)

    def batch(number: int) -> jax.Array:
        # Each row is a function of the step alone: the same on any mesh, with nothing to save.
        def row(i: int) -> Any:
            rng = np.random.default_rng((args.seed, number, i))
            return sample_windows(rng, data, 1, CONTEXT + 1)

        # Called only for the rows of this process's devices.
        def draw(index: Any) -> Any:
            return np.concatenate([row(i) for i in range(args.batch_size)[index[0]]])

        return jax.make_array_from_callback((args.batch_size, CONTEXT + 1), rows, draw)

    windows = sample_windows(np.random.default_rng(0), held_out, HELD_OUT, CONTEXT + 1)
    unseen = jax.make_array_from_callback(windows.shape, everywhere, lambda index: windows[index])
    return Job(init, step, jax.jit(loss_of, out_shardings=everywhere), batch, unseen)


def optimizer_of(args: argparse.Namespace, parser: Parser) -> optax.GradientTransformation:
    """The optimizer, as the flags say."""
    adamaxw_or_peer = OPTIMIZERS[args.optimizer](
        # Independent of the number of steps, which may change from one start to the next.
        optax.linear_schedule(0.0, args.learning_rate, WARMUP),
        weight_decay=args.weight_decay,
        mask=adamaxw.masks.matrices,
        **parser.low_precision(args),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), adamaxw_or_peer)


def train(
    args: argparse.Namespace, optimizer: optax.GradientTransformation, parser: Parser
) -> None:
    """Trains from the last checkpoint to the end; every process of the job runs this."""
    check_batch(args.batch_size, jax.device_count(), parser)
    root = sysconfig.get_paths()["stdlib"]
    data, held_out = map(as_array, split_sources(read_sources(root, MAX_BYTES)))
    if min(len(data), len(held_out)) <= CONTEXT:
        parser.fail(f"too little Python source to read in {root}")
    job = make_job(args, optimizer, data, held_out)
    abstract = job.init.eval_shape()
    say(
        f"{jax.process_count()} processes, {jax.device_count()} {jax.default_backend()} devices, "
        f"{args.strategy}: {bytes_a_device(abstract.params):,} bytes of parameters and "
        f"{bytes_a_device(abstract.state):,} of state per device"
    )
    flags = {name: value for name, value in vars(args).items() if name not in CHANGING}
    with checkpoints.opened(args.output) as folder:
        start, run = checkpoints.begin(folder, job.init, args.steps, flags, parser)
        for step in range(start, args.steps):
            loss, run = job.step(run, job.batch(step))
            check_loss(loss, step, parser)
            done = step + 1
            if done % args.save_every == 0 or done == args.steps:
                checkpoints.save(folder, done, run, flags)
    loss = job.loss(run.params, job.held_out)
    check_loss(loss, args.steps, parser)
    say(f"loss {loss:.4f}, checksum {checkpoints.checksum(run)[:16]}")


def check_loss(loss: jax.Array, steps: int, parser: Parser) -> None:
    """Ends the program if the loss after some number of steps is not finite."""
    if not math.isfinite(loss):
        parser.fail(
            f"diverged after {steps} steps; try another --learning-rate, with another --output"
        )


def check_batch(size: int, devices: int, parser: Parser) -> None:
    """Ends the program if a batch cannot be divided among the devices."""
    if size % devices:
        parser.error(
            f"argument --batch-size: must be divisible by the number of devices, {devices}, "
            f"got {size}"
        )


def join(
    args: argparse.Namespace, optimizer: optax.GradientTransformation, parser: Parser
) -> NoReturn:
    """Trains as one process of a job, and ends this process."""
    if args.launched:
        launcher.end_with_launcher()
    # Gloo prints its connections to stdout, which is reserved for results.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Otherwise JAX catches SIGTERM and waits for the program to poll for it.
    jax.config.update("jax_enable_preemption_service", False)
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            # By default process 0 would listen on all interfaces.
            coordinator_bind_address=args.coordinator if args.launched else None,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=PATIENCE,
        )
        train(args, optimizer, parser)
        jax.distributed.shutdown()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except jax.errors.JaxRuntimeError as error:
        (first, *_) = str(error).splitlines()
        name = f"process {args.process} of {args.processes}"
        sys.stderr.write(f"{parser.prog}: error: {name}: {first}; {TO_RESUME}\n")
        status = launcher.LOST
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # After sys.exit, JAX would wait for processes that may in turn wait for this one.
    os._exit(status)


def launch(argv: Sequence[str], processes: int, parser: Parser) -> int:
    """Starts all processes of a job on this machine, and returns when they have ended."""
    launcher.stop_on_signals()
    address = f"127.0.0.1:{launcher.free_port()}"
    command = [sys.executable, __file__, *argv, "--launched", "--coordinator", address]
    try:
        end = launcher.launch([[*command, "--process", str(i)] for i in range(processes)])
    except launcher.Stopped as stopped:
        (number,) = stopped.args
        parser.fail(f"stopped by {number.name}; {TO_RESUME}", 128 + number)
    sys.stderr.write(end.log)
    if end.reason:
        parser.fail(f"{end.reason}; {TO_RESUME}" if end.is_lost else end.reason, end.status)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job, or one process of it; returns the exit status."""
    parser = Parser(
        "A byte-level language model, trained in several processes.",
        learning_rate=0.01,
        weight_decay=0.1,
        output="output/distributed",
    )
    parser.add_low_precision()
    add = parser.add_argument
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the model",
    )
    add("--steps", type=integer_in(1, 10**6), default=60, help="in total")
    add("--save-every", type=integer_in(1, 10**6), default=20, help="steps")
    add("--batch-size", type=integer_in(1, 4096), default=16, help="windows per step, in total")
    add("--strategy", choices=("data", "fsdp", "zero1"), default="zero1", help="what is sharded")
    add("--processes", type=integer_in(1, 64), default=2, help="of the job")
    add(
        "--devices",
        type=integer_in(0, 64),
        default=4,
        help="CPU devices of each process; 0, with --coordinator: the devices that JAX finds",
    )
    add("--coordinator", metavar="HOST:PORT", help="of process 0: be one process of the job")
    add("--process", type=integer_in(0, 63), metavar="I", help="which one, with --coordinator")
    add("--launched", action="store_true", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if (args.coordinator is None) != (args.process is None):
        parser.error("argument --process: pass it together with --coordinator, or neither")
    if args.process is not None and args.process >= args.processes:
        parser.error(f"argument --process: must be below --processes, got {args.process}")
    if args.devices:
        check_batch(args.batch_size, args.processes * args.devices, parser)
    elif args.coordinator is None:
        parser.error("argument --devices: 0 is allowed only with --coordinator")
    parser.folder(args.output)
    optimizer = optimizer_of(args, parser)
    if args.coordinator is None:
        return launch(argv, args.processes, parser)
    join(args, optimizer, parser)


if __name__ == "__main__":
    sys.exit(main())
