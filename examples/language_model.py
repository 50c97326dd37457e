"""Train a small language model on the source code of Python's standard library.

A byte-level transformer in Flax NNX learns to predict the next byte of the `.py` files that come
with Python, so there is nothing to download. It shows AdamaxW with a learning rate schedule, with
weight decay on the matrices only and after gradient clipping, and logs the optimizer's diagnostics.
Run::

    python examples/language_model.py
    python examples/language_model.py --optimizer optax.adamw --learning-rate 0.006
    python examples/language_model.py --dtype bfloat16 --moments uint8 --rounding stochastic
"""

import math
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command_line import OPTIMIZERS, Parser, bytes_per_parameter, integer_in
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import adamaxw

# Tests and data tables are unlike the rest of the library; the other folders do not belong to it.
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
MAX_BYTES = 5_000_000
HEAD_SIZE = 32
EVALUATIONS = 10
HELD_OUT_BYTES = 2**14


class Split(NamedTuple):
    """Files to train on and files held out, none of them in both."""

    train: dict[str, bytes]
    held_out: dict[str, bytes]


class History(NamedTuple):
    """Losses in nats per byte, and seconds per step.

    Held-out losses come with the number of steps done. Diagnostics are of the last step before each
    held-out loss but the first; there are none for Optax's optimizers.
    """

    train: list[float]
    held_out: list[tuple[int, float]]
    seconds: list[float]
    diagnostics: list[dict[str, float]]


def read_sources(root: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, bytes]:
    """Reads `.py` files below `root` in a fixed order, up to `max_bytes` in total, by path."""
    sources: dict[str, bytes] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        for path in sorted(Path(folder, name) for name in names if name.endswith(".py")):
            try:
                text = path.read_bytes()
            except OSError:
                continue
            if len(text) > max_bytes:
                return sources
            max_bytes -= len(text)
            sources[str(path.relative_to(root))] = text
    return sources


def split_sources(sources: dict[str, bytes]) -> Split:
    """Holds out every tenth file."""
    parts = ({}, {})
    for i, (path, text) in enumerate(sources.items()):
        parts[i % 10 == 9][path] = text
    return Split(*parts)


def as_array(sources: dict[str, bytes]) -> np.ndarray:
    """The concatenated bytes of all files, as uint8."""
    return np.frombuffer(b"".join(sources.values()), np.uint8)


def sample_windows(rng: np.random.Generator, data: np.ndarray, count: int, length: int) -> Any:
    """Draws `count` windows of `length` consecutive bytes: int32, (count, length)."""
    starts = rng.integers(len(data) - length + 1, size=(count, 1))
    return data[starts + np.arange(length)].astype(np.int32)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention to current and earlier positions; shapes (batch, length, heads, size)."""
    # The softmax is float32 whatever the model's dtype.
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    earlier = jnp.tri(q.shape[1], dtype=bool)
    weights = jax.nn.softmax(scores / math.sqrt(q.shape[-1]), where=earlier)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(v.dtype), v)


class Block(nnx.Module):
    """A pre-norm block: causal self-attention, then a feed-forward layer, both residual."""

    def __init__(self, width: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        heads = width // HEAD_SIZE
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        # LayerNorm computes in float32, even with bfloat16 parameters.
        self.norm_1 = nnx.LayerNorm(width, **options | {"dtype": jnp.float32})
        self.qkv = nnx.LinearGeneral(width, (3, heads, HEAD_SIZE), use_bias=False, **options)
        self.project = nnx.LinearGeneral(
            (heads, HEAD_SIZE), width, axis=(-2, -1), use_bias=False, **options
        )
        self.norm_2 = nnx.LayerNorm(width, **options | {"dtype": jnp.float32})
        self.expand = nnx.Linear(width, 4 * width, use_bias=False, **options)
        self.contract = nnx.Linear(4 * width, width, use_bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (batch, length, width) to the same shape."""
        q, k, v = jnp.unstack(self.qkv(self.norm_1(x)), axis=-3)
        x = x + self.project(causal_attention(q, k, v))
        return x + self.contract(jax.nn.gelu(self.expand(self.norm_2(x))))


class Transformer(nnx.Module):
    """A decoder: logits of each next byte from the bytes before it."""

    def __init__(
        self, width: int, layers: int, context: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        self.context = context
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        small = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(256, width, embedding_init=nnx.initializers.normal(1.0), **options)
        self.positions = nnx.Embed(context, width, embedding_init=small, **options)
        self.blocks = nnx.List([Block(width, dtype, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, **options | {"dtype": jnp.float32})
        # Small logits: training starts near the uniform distribution.
        self.head = nnx.Linear(width, 256, use_bias=False, kernel_init=small, **options)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps integers (batch, length) to logits (batch, length, 256)."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_fn(model: Transformer, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next byte, in nats per byte, as float32."""
    logits = model(windows[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


evaluate = nnx.jit(loss_fn)


@nnx.jit(donate_argnums=(0, 1), static_argnames="diagnose")
def train_step(
    model: Transformer,
    optimizer: nnx.Optimizer[Transformer],
    windows: jax.Array,
    diagnose: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Updates model and optimizer; returns the loss before the update, and diagnostics if asked."""
    loss, gradients = nnx.value_and_grad(loss_fn)(model, windows)
    updates = optimizer.update(model, gradients)
    if not diagnose:
        return loss, {}
    params = nnx.state(model, nnx.Param)
    return loss, adamaxw.diagnostics(updates, optimizer.opt_state, params)


def warmup_and_cosine(peak: float, steps: int) -> optax.Schedule:
    """Linear warmup to `peak` over a tenth of the steps, then cosine decay to a tenth of it."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, peak / 10)
    # In float32, because this schedule does not support integers under strict promotion.
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def train(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    split: Split,
    steps: int,
    batch_size: int,
    seed: int,
    diagnose: bool,
    console: Console,
) -> History:
    """Trains with a progress bar, to the end or until the loss is not finite."""
    rng = np.random.default_rng(seed)
    data = as_array(split.train)
    length = model.context + 1
    # The same windows each time and for every seed, so that runs are comparable.
    count = max(1, HELD_OUT_BYTES // model.context)
    held_out = sample_windows(np.random.default_rng(0), as_array(split.held_out), count, length)
    state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    history = History([], [(0, float(evaluate(model, held_out)))], [], [])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("compiling", total=steps)
        for step in range(1, steps + 1):
            windows = sample_windows(rng, data, batch_size, length)
            start = time.perf_counter()
            loss, diagnostics = train_step(model, state, windows, diagnose)
            loss = float(loss)
            history.seconds.append(time.perf_counter() - start)
            history.train.append(loss)
            if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
                history.held_out.append((step, float(evaluate(model, held_out))))
                if diagnose:
                    history.diagnostics.append({k: float(x) for k, x in diagnostics.items()})
            speed = batch_size * model.context / history.seconds[-1]
            progress.update(task, advance=1, description=f"loss {loss:.3f}, {speed:,.0f} tokens/s")
            if not math.isfinite(loss):
                break
    return history


def diagnostics_table(history: History) -> Table:
    """The optimizer's diagnostics at each evaluation, with the held-out loss."""
    names = history.diagnostics[0]
    table = Table("step", "held out", *(name.replace("_", " ") for name in names))
    rows = zip(history.held_out[1:], history.diagnostics, strict=True)
    for (step, loss), diagnostics in rows:
        table.add_row(str(step), f"{loss:.4f}", *(f"{diagnostics[name]:.3g}" for name in names))
    return table


def draw(path: Path, history: History, title: str) -> None:
    """Plots the training loss, raw and smoothed, and the held-out loss."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(history.train) + 1)
    axes.plot(steps, history.train, color="tab:blue", alpha=0.25, label="training, each batch")
    window = max(1, len(steps) // 30)
    smooth = np.convolve(history.train, np.full(window, 1 / window), "valid")
    middles = steps[window // 2 :][: len(smooth)]
    axes.plot(middles, smooth, color="tab:blue", label=f"mean of {window} batches")
    axes.plot(*zip(*history.held_out, strict=True), "o-", color="tab:orange", label="held out")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy (nats per byte)")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints what was measured, writes `loss.png`; returns the exit status."""
    parser = Parser(
        "A byte-level language model of Python's standard library.",
        learning_rate=0.02,
        weight_decay=0.1,
        output="output/language_model",
    )
    parser.add_argument("--steps", type=integer_in(1, 10**6), default=900, help="updates")
    parser.add_argument(
        "--batch-size", type=integer_in(1, 4096), default=16, help="windows in a step"
    )
    parser.add_argument("--context", type=integer_in(1, 4096), default=64, help="bytes per window")
    parser.add_argument("--layers", type=integer_in(1, 64), default=2, help="of the transformer")
    parser.add_argument("--heads", type=integer_in(1, 64), default=3, help=f"of width {HEAD_SIZE}")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the model",
    )
    parser.add_low_precision()
    args = parser.parse_args(argv)
    options = parser.low_precision(args)
    parser.folder(args.output)
    console = Console()

    root = sysconfig.get_paths()["stdlib"]
    split = split_sources(read_sources(root))
    if min(len(as_array(part)) for part in split) <= args.context:
        parser.fail(f"too little Python source to read in {root}")
    for name, sources in split._asdict().items():
        size = sum(map(len, sources.values()))
        console.print(f"{name.replace('_', ' ')}: {len(sources)} files, {size:,} bytes")
    width = HEAD_SIZE * args.heads
    model = Transformer(width, args.layers, args.context, args.dtype, nnx.Rngs(args.seed))
    params = nnx.state(model, nnx.Param)
    console.print(adamaxw.masks.describe(params, adamaxw.masks.matrices))

    schedule = warmup_and_cosine(args.learning_rate, args.steps)
    make = OPTIMIZERS[args.optimizer]
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        make(schedule, weight_decay=args.weight_decay, mask=adamaxw.masks.matrices, **options),
    )
    number = sum(p.size for p in jax.tree.leaves(params))
    state = optimizer.init(params)
    console.print(
        f"bytes per parameter: {bytes_per_parameter(params, number):.2f} for parameters, "
        f"{bytes_per_parameter(state, number):.2f} for the optimizer's state"
    )
    start = time.perf_counter()
    diagnose = args.optimizer == "adamaxw"
    history = train(
        model, optimizer, split, args.steps, args.batch_size, args.seed, diagnose, console
    )
    seconds = time.perf_counter() - start
    if not math.isfinite(history.train[-1]):
        parser.fail(f"diverged in step {len(history.train)}; try another --learning-rate")

    if diagnose:
        console.print(diagnostics_table(history))
    table = Table("held-out loss", "nats per byte", "bits per byte")
    for name, (_, loss) in (("before", history.held_out[0]), ("after", history.held_out[-1])):
        table.add_row(f"{name} training", f"{loss:.4f}", f"{loss / math.log(2):.4f}")
    console.print(table)
    # The first step compiles.
    speed = args.batch_size * args.context / np.mean(history.seconds[1:] or history.seconds)
    picture = args.output / "loss.png"
    draw(picture, history, f"{args.optimizer}, learning rate {args.learning_rate:g}")
    console.out(
        f"{args.optimizer}, {args.dtype}: {args.steps} steps in {seconds:.1f} s, "
        f"{speed:,.0f} tokens (bytes) per second; picture: {picture}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
