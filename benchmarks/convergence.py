"""Training with each format of the moments and each rounding of the parameters.

Trains the byte-level transformer and the VAE of the examples from several seeds, with
`optax.adamaxw` in float32 and with every `moment_dtype` and `param_rounding` of `adamaxw.adamaxw`.
All runs of one seed start from the same parameters and see the same data. Only the storage differs:
the loss casts bfloat16 parameters to float32, and their gradients arrive in bfloat16. Run it with

    python benchmarks/convergence.py             # trains, writes results/convergence.json
    python benchmarks/convergence.py --report    # prints the tables, draws the curves
"""

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from versions import versions

import adamaxw

# The models and the data of the examples.
sys.path.append(str(Path(__file__).parents[1] / "examples"))
import equinox as eqx
import language_model
import vae
from flax import nnx

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "convergence.json"
PICTURE = HERE.parent / "docs" / "convergence.png"
EVALUATIONS = 20
REFERENCE = "optax.adamaxw, float32"


class Task(NamedTuple):
    """A training problem.

    Attributes:
        unit: of the loss.
        init: maps a key to float32 params.
        batches: maps a NumPy generator to the data of all steps, stacked along the first axis.
        loss: maps params, a batch and a key to the training loss.
        held_out: maps params to the held-out loss.
        optimizer: maps `adamaxw.adamaxw`, `optax.adamaxw` or the like to the optimizer.
    """

    unit: str
    init: Callable[[jax.Array], Any]
    batches: Callable[[np.random.Generator], Any]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    held_out: Callable[[Any], jax.Array]
    optimizer: Callable[[Any], Any]


def transformer(steps: int = 600, batch: int = 16, context: int = 32) -> Task:
    """The byte-level language model of the examples, 2 layers of width 64."""

    def model(seed: Any) -> Any:
        return language_model.Transformer(64, 2, context, jnp.float32, nnx.Rngs(seed))

    graph = nnx.graphdef(model(0))
    sources = language_model.read_sources(sysconfig.get_paths()["stdlib"])
    split = language_model.split_sources(sources)
    train, held_out = (language_model.as_array(part) for part in split)
    windows = jnp.asarray(
        language_model.sample_windows(np.random.default_rng(0), held_out, 512, context + 1)
    )

    def loss(params: Any, batch: Any) -> jax.Array:
        return language_model.loss_fn(nnx.merge(graph, params), batch)

    return Task(
        "nats per byte",
        lambda key: nnx.as_pure(nnx.state(model(key), nnx.Param)),
        lambda rng: np.stack(
            [
                language_model.sample_windows(rng, train, batch, context + 1).astype(np.uint8)
                for _ in range(steps)
            ]
        ),
        lambda params, batch, key: loss(params, batch.astype(jnp.int32)),
        lambda params: loss(params, windows),
        lambda make: optax.chain(
            optax.clip_by_global_norm(1.0),
            make(
                language_model.warmup_and_cosine(0.02, steps),
                weight_decay=0.1,
                mask=adamaxw.masks.matrices,
            ),
        ),
    )


def autoencoder(epochs: int = 50, batch: int = 64) -> Task:
    """The VAE of the examples."""
    images, held_out = vae.digits()
    _, static = eqx.partition(vae.VAE(12, jax.random.key(0)), eqx.is_inexact_array)

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return eqx.combine(params, static).negative_elbo(batch, key).total

    def batches(rng: np.random.Generator) -> Any:
        orders = [rng.permutation(len(images)) for _ in range(epochs)]
        full = len(images) // batch * batch
        picked = np.concatenate([order[:full] for order in orders]).reshape(-1, batch)
        return np.asarray(images)[picked].astype(np.uint8)

    return Task(
        "nats per image",
        lambda key: eqx.filter(vae.VAE(12, key), eqx.is_inexact_array),
        batches,
        lambda params, batch, key: loss(params, batch.astype(jnp.int32), key),
        lambda params: loss(params, held_out, jax.random.key(1)),
        lambda make: make(0.003, weight_decay=0.03, mask=adamaxw.masks.matrices),
    )


TASKS = {"transformer": transformer, "VAE": autoencoder}


class Variant(NamedTuple):
    """An optimizer, and the dtype of the parameters."""

    make: Callable[..., Any]
    dtype: str


def variants() -> dict[str, Variant]:
    """All combinations by name; the first is the reference."""
    chosen = {REFERENCE: Variant(optax.adamaxw, "float32")}
    moments = (None, "bfloat16", "uint8")

    def ours(moment_dtype: str | None, rounding: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: adamaxw.adamaxw(
            *args, **kwargs, moment_dtype=moment_dtype, param_rounding=rounding
        )

    for moment_dtype in moments:
        name = f"float32, moments {moment_dtype}"
        chosen[name] = Variant(ours(moment_dtype, "nearest"), "float32")
    chosen["optax.adamaxw, bfloat16"] = Variant(optax.adamaxw, "bfloat16")
    for rounding in ("nearest", "stochastic", "exact"):
        for moment_dtype in moments:
            name = f"bfloat16 {rounding}, moments {moment_dtype}"
            chosen[name] = Variant(ours(moment_dtype, rounding), "bfloat16")
    return chosen


def train(task: Task, variant: Variant, seeds: int) -> np.ndarray:
    """Held-out losses before and during training, of shape (seeds, EVALUATIONS + 1)."""
    opt = task.optimizer(variant.make)

    def wide(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.float32), params)

    def step(carry: Any, item: Any) -> tuple[Any, None]:
        params, state = carry
        batch, key = item
        grads = jax.grad(lambda params: task.loss(wide(params), batch, key))(params)
        updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train_part(carry: Any, batches: Any, keys: Any) -> Any:
        return jax.lax.scan(step, carry, (batches, keys))[0]

    held_out = jax.jit(lambda params: task.held_out(wide(params)))
    losses = np.zeros((seeds, EVALUATIONS + 1))
    for seed in range(seeds):
        init_key, train_key = jax.random.split(jax.random.key(seed))
        params = jax.tree.map(lambda p: p.astype(variant.dtype), task.init(init_key))
        data = task.batches(np.random.default_rng(seed))
        keys = jax.random.split(train_key, len(data))
        carry = params, opt.init(params)
        losses[seed, 0] = held_out(params)
        parts = np.split(np.arange(len(data)), EVALUATIONS)
        for i, part in enumerate(parts):
            carry = train_part(carry, data[part], keys[part])
            losses[seed, i + 1] = held_out(carry[0])
    return losses


def measure(path: Path, tasks: list[str], seeds: int, console: Console) -> None:
    """Trains the variants that are not in the file at `path`, and writes it after each."""
    results: dict[str, Any] = {"command": "python benchmarks/convergence.py"}
    if path.exists():
        results = json.loads(path.read_text())
    results |= {"versions": versions(), "seeds": seeds}
    path.parent.mkdir(exist_ok=True)
    for name in tasks:
        task = TASKS[name]()
        runs = results.setdefault(name, {"unit": task.unit, "held_out": {}})["held_out"]
        for variant_name, variant in variants().items():
            if variant_name in runs:
                continue
            start = time.perf_counter()
            losses = train(task, variant, seeds)
            runs[variant_name] = [[round(float(x), 6) for x in lane] for lane in losses]
            path.write_text(json.dumps(results, indent=1) + "\n")
            console.print(
                f"{name}, {variant_name}: {losses[:, -1].mean():.4f} "
                f"({time.perf_counter() - start:.0f} s)"
            )


def table(runs: dict[str, Any]) -> list[str]:
    """Lines of Markdown: final loss, its spread over seeds, and the difference to the reference.

    Each difference is that of runs of the same seed, with the standard error of its mean.
    """
    final = {name: np.array(runs[name])[:, -1] for name in variants() if name in runs}
    lines = [
        "| optimizer and parameters | final held-out loss | spread | difference to the first |",
        "|---|---|---|---|",
    ]
    for name, losses in final.items():
        difference = losses - final[REFERENCE]
        error = difference.std(ddof=1) / math.sqrt(len(losses))
        against = "" if name == REFERENCE else f"{difference.mean():+.4f} ± {error:.4f}"
        lines.append(f"| {name} | {losses.mean():.4f} | {losses.std(ddof=1):.4f} | {against} |")
    return lines


def draw(path: Path, results: dict[str, Any]) -> None:
    """Plots held-out losses, mean over seeds, with the spread of the reference as a band."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    names = [name for name in TASKS if name in results]
    for name, (left, right) in zip(names, panels, strict=False):
        found = results[name]["held_out"]
        runs = {key: np.array(found[key]) for key in variants() if key in found}
        progress = np.linspace(0, 100, EVALUATIONS + 1)
        reference = runs[REFERENCE].mean(axis=0)
        spread = runs[REFERENCE].std(axis=0, ddof=1)
        colors = iter(matplotlib.colormaps["tab20"](range(20)))
        for key, lanes in runs.items():
            lost = "nearest" in key or key == "optax.adamaxw, bfloat16"
            style = {"lw": 2.5, "color": "black"} if key == REFERENCE else {"color": next(colors)}
            style |= {"linestyle": ":" if lost else "-"}
            left.semilogy(progress[1:], lanes.mean(axis=0)[1:], **style)
            right.plot(progress[1:], (lanes.mean(axis=0) - reference)[1:], label=key, **style)
        right.fill_between(
            progress[1:], -spread[1:], spread[1:], color="black", alpha=0.12, lw=0, label="spread"
        )
        limit = 4 * spread[EVALUATIONS // 4 :].max()
        right.set(ylim=(-limit, limit), title=f"{name}: difference to {REFERENCE}")
        left.set(title=f"{name}: held-out loss ({results[name]['unit']})")
        for axes in (left, right):
            axes.set(xlabel="training (%)")
    panels[0, 1].legend(fontsize=7, ncols=2)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Trains or reports, as the command line says."""
    parser = argparse.ArgumentParser(description="Train with every format and rounding.")
    parser.add_argument("--report", action="store_true", help="print and draw what was measured")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to read and write")
    args = parser.parse_args()
    console = Console()
    if not args.report:
        measure(args.results, args.tasks, args.seeds, console)
    results = json.loads(args.results.read_text())
    print(f"{results['seeds']} seeds; {results['versions']}")
    for name in TASKS:
        if name in results:
            print(f"\n{name}, {results[name]['unit']}:\n")
            print(*table(results[name]["held_out"]), sep="\n")
    if args.results == RESULTS:
        draw(PICTURE, results)


if __name__ == "__main__":
    main()
