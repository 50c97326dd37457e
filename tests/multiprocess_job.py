"""One process of a job on several, for the tests: trains, and writes what came out.

Run as `multiprocess_job.py ADDRESS PROCESSES PROCESS DEVICES FOLDER [STRATEGY ...]`. The first
process writes a file for each part of the work to the folder.
"""

import argparse
import functools
import itertools
import json
import sys
from pathlib import Path

import checkpoints
import distributed
import jax
import jax.numpy as jnp
import launcher
import numpy as np
import optax
from cases import PAIRS
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import adamaxw

STRATEGIES = ("zero1", "fsdp")
STEPS = 4
# For the example: an eps so large that the last bits of gradients do not decide steps.
LEARNING_RATE, EPS = 0.01, 1e-3
SHAPES = {
    "matrix": jax.ShapeDtypeStruct((3, 16, 24), jnp.bfloat16),
    "vector": jax.ShapeDtypeStruct((40,), jnp.float32),
    "odd": jax.ShapeDtypeStruct((5, 7), jnp.bfloat16),
}


def whole(tree, mesh):
    """The arrays of a tree, each of them on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda tree: tree, out_shardings=everywhere)(tree)


def write(folder, name, content):
    """In the first process alone."""
    if jax.process_index() == 0:
        (folder / name).write_text(json.dumps(content))


def equal_gradients(mesh):
    """Every format and rounding, given the same gradients on any mesh.

    Returns, under the strategy, format and rounding, checksums of parameters and state, and the
    bytes of the state on each device of this process.
    """
    optimizers, shardings = {}, {}
    for strategy, (moments, rounding) in itertools.product(STRATEGIES, PAIRS):
        name = f"{strategy} {moments} {rounding}"
        optimizers[name] = adamaxw.adamaxw(
            0.01, weight_decay=0.1, moment_dtype=moments, param_rounding=rounding
        )
        shardings[name] = distributed.shardings_of(strategy, optimizers[name], SHAPES, mesh)

    def numbers(seed, scale):
        rng = np.random.default_rng(seed)
        return {
            name: (scale * rng.standard_normal(x.shape)).astype(np.float32)
            for name, x in SHAPES.items()
        }

    def init_one(optimizer, params):
        params = jax.tree.map(lambda p, x: p.astype(x.dtype), params, SHAPES)
        return distributed.Run(params, optimizer.init(params))

    def step_one(optimizer, run, grads):
        updates, state = optimizer.update(grads, run.state, run.params)
        return distributed.Run(optax.apply_updates(run.params, updates), state)

    @functools.partial(jax.jit, out_shardings=shardings)
    def init(params):
        return {name: init_one(optimizer, params) for name, optimizer in optimizers.items()}

    @functools.partial(jax.jit, out_shardings=shardings)
    def step(runs, grads):
        return {name: step_one(optimizers[name], run, grads) for name, run in runs.items()}

    runs = init(numbers(0, 1.0))
    for i in range(STEPS):
        runs = step(runs, numbers(i + 1, 10.0 ** (i - 3)))
    gathered = whole(runs, mesh)
    return {
        name: {
            "params": checkpoints.checksum(gathered[name].params),
            "state": checkpoints.checksum(gathered[name].state),
            "bytes": bytes_on_each_device(runs[name].state),
        }
        for name in optimizers
    }


def bytes_on_each_device(tree):
    """The bytes of the shards that lie on each device of this process."""
    shards = [shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards]
    return [sum(s.data.nbytes for s in shards if s.device == d) for d in jax.local_devices()]


def example(strategy):
    """The parameters of the example after a few steps, and its losses."""
    args = argparse.Namespace(strategy=strategy, dtype="float32", seed=0, batch_size=8)
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        adamaxw.adamaxw(LEARNING_RATE, eps=EPS, mask=adamaxw.masks.matrices),
    )
    job = distributed.make_job(args, optimizer, text, text)
    run, losses = job.init(), []
    for i in range(STEPS):
        loss, run = job.step(run, job.batch(i))
        losses.append(float(loss))
    mesh = jax.tree.leaves(run)[0].sharding.mesh
    leaves = jax.tree.leaves(whole(run.params, mesh))
    return losses, np.concatenate([np.asarray(x).ravel() for x in leaves])


def main():
    """Does the work of one process."""
    address, processes, process, devices, folder, *strategies = sys.argv[1:]
    launcher.end_with_launcher()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.distributed.initialize(address, int(processes), int(process))
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    write(Path(folder), "equal_gradients.json", equal_gradients(mesh))
    # Before the example, whose many operations take long to compile.
    jax.config.update("jax_disable_most_optimizations", True)
    for strategy in strategies:
        losses, params = example(strategy)
        write(Path(folder), f"{strategy}.json", losses)
        if jax.process_index() == 0:
            np.save(Path(folder) / f"{strategy}.npy", params)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
