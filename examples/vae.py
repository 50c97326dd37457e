"""A variational autoencoder on 8x8 digits in Equinox, trained with AdamaxW.

The model is that of Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014
(https://arxiv.org/abs/1312.6114), with a binomial likelihood; the digits come with scikit-learn.
Weight decay acts on the weight matrices only. Run::

    python examples/vae.py
    python examples/vae.py --optimizer optax.adamw --learning-rate 0.001
"""

import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from command_line import OPTIMIZERS, Parser, integer_in
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from adamaxw import masks

PIXELS = 64
TRIALS = 16
LOG_BINOMIAL = np.log([math.comb(TRIALS, k) for k in range(TRIALS + 1)]).astype(np.float32)


class NegativeELBO(NamedTuple):
    """The two parts of the negative evidence lower bound, in nats per image."""

    reconstruction: Any
    kl: Any

    @property
    def total(self) -> Any:
        """An upper bound of -log p(image)."""
        return self.reconstruction + self.kl


class VAE(eqx.Module):
    """An encoder to a diagonal Gaussian q(z | image), and a decoder to one logit per pixel."""

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, latent: int, key: jax.Array):
        encoder_key, decoder_key = jax.random.split(key)
        mlp = partial(eqx.nn.MLP, width_size=256, depth=2, activation=jax.nn.silu)
        self.encoder = mlp(PIXELS, 2 * latent, key=encoder_key)
        self.decoder = mlp(latent, PIXELS, key=decoder_key)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log standard deviation of q(z | image), each of shape (images, latent)."""
        centred = 2 * images.astype(jnp.float32) / TRIALS - 1
        mean, log_std = jnp.split(jax.vmap(self.encoder)(centred), 2, axis=-1)
        return mean, log_std

    @eqx.filter_jit
    def negative_elbo(self, images: jax.Array, key: jax.Array) -> NegativeELBO:
        """The mean over images, int32 of shape (images, 64), with one sample of z for each."""
        mean, log_std = self.encode(images)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        logits = jax.vmap(self.decoder)(z)
        # A pixel counts how many of 16 dots of a finer scan are inked. The binomial is a
        # distribution over these counts, so this bounds -log p(image); the usual cross-entropy of
        # pixel / 16 is not the negative log-likelihood of any distribution over them.
        log_likelihood = (
            jnp.asarray(LOG_BINOMIAL)[images]
            + images.astype(jnp.float32) * logits
            - TRIALS * jax.nn.softplus(logits)
        )
        kl = (jnp.exp(2 * log_std) + mean**2 - 1) / 2 - log_std
        return NegativeELBO(-log_likelihood.sum(axis=-1).mean(), kl.sum(axis=-1).mean())


def train_step(
    model: VAE, state: Any, optimizer: Any, images: jax.Array, key: jax.Array
) -> tuple[VAE, Any, jax.Array]:
    """One update on a minibatch; the loss returned is that before the update."""
    value_and_grad = eqx.filter_value_and_grad(lambda m: m.negative_elbo(images, key).total)
    loss, grads = value_and_grad(model)
    updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss


@eqx.filter_jit
def train_epoch(
    model: VAE, state: Any, optimizer: Any, batches: jax.Array, key: jax.Array
) -> tuple[VAE, Any, jax.Array]:
    """One update per batch, for batches of shape (steps, batch, 64); also returns the mean loss."""
    # A scan can only carry arrays, but a module also holds functions.
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        arrays, state = carry
        model, state, loss = train_step(eqx.combine(arrays, static), state, optimizer, *batch)
        return (eqx.filter(model, eqx.is_array), state), loss

    keys = jax.random.split(key, len(batches))
    (arrays, state), losses = jax.lax.scan(step, (arrays, state), (batches, keys))
    return eqx.combine(arrays, static), state, jnp.mean(losses)


def digits() -> tuple[jax.Array, jax.Array]:
    """Training and held-out images, int32 of shape (images, 64) with values 0 to 16."""
    images, labels = load_digits(return_X_y=True)
    # The split does not depend on --seed, so that runs are comparable.
    split = train_test_split(images, test_size=360, stratify=labels, random_state=0)
    train_images, held_out = (jnp.asarray(part, jnp.int32) for part in split)
    return train_images, held_out


def train(
    model: VAE,
    optimizer: Any,
    images: jax.Array,
    held_out: jax.Array,
    epochs: int,
    batch_size: int,
    key: jax.Array,
) -> tuple[VAE, list[float], list[NegativeELBO]]:
    """Trains to the end, or until the held-out bound is not finite.

    Returns:
        The model, the mean loss per epoch, and the held-out bounds before training and after each
        epoch.
    """
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    order_key, noise_key, held_out_key = jax.random.split(key, 3)
    # The same noise every time, so that the curve shows changes of the model only.
    bounds = [model.negative_elbo(held_out, held_out_key)]
    losses = []
    for epoch in track(range(epochs), "Training"):
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), len(images))
        # A last batch that is not full is left out.
        order = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)
        epoch_key = jax.random.fold_in(noise_key, epoch)
        model, state, loss = train_epoch(model, state, optimizer, images[order], epoch_key)
        losses.append(float(loss))
        bounds.append(model.negative_elbo(held_out, held_out_key))
        if not math.isfinite(bounds[-1].total):
            break
    return model, losses, bounds


@eqx.filter_jit
def reconstruct_and_sample(model: VAE, images: jax.Array, key: jax.Array) -> jax.Array:
    """Mean pixels from codes of the images, and of the prior: (2, images, 64)."""
    codes, _ = model.encode(images)
    codes = jnp.stack([codes, jax.random.normal(key, codes.shape)])
    return TRIALS * jax.nn.sigmoid(jax.vmap(jax.vmap(model.decoder))(codes))


def draw_images(axes: Any, title: str, images: Any) -> Any:
    """Shows 64 images in 8 rows with margins; returns the mappable for a colour bar."""
    tiles = np.pad(images.reshape(8, 8, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)))
    axes.set(title=title, xticks=[], yticks=[])
    picture = tiles.transpose(0, 2, 1, 3).reshape(80, 80)
    return axes.imshow(picture, cmap="gray_r", vmin=0, vmax=TRIALS)


def draw(path: Path, panels: dict[str, Any], losses: list[float], bounds: list[float]) -> None:
    """Plots the images in `panels`, by title, and the training curves."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    axes = figure.subplot_mosaic([[*panels], ["curves"] * len(panels)], height_ratios=[3, 2])
    curves = axes.pop("curves")
    shown = [draw_images(axes[title], title, images) for title, images in panels.items()]
    figure.colorbar(shown[0], ax=list(axes.values()), label="pixel value (dots of 16)")
    curves.semilogy(range(1, len(losses) + 1), losses, label="training, mean over the epoch")
    curves.semilogy(bounds, label="held out, after the epoch")
    curves.set(title="Training", xlabel="epoch", ylabel="negative ELBO (nats per image)")
    curves.yaxis.set(major_formatter="{x:.0f}", minor_formatter="{x:.0f}")
    curves.legend()
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, prints the held-out negative ELBO, writes the picture; returns the exit status."""
    parser = Parser(
        "A variational autoencoder on 8x8 digits.",
        learning_rate=0.003,
        weight_decay=0.03,
        output="output/vae",
    )
    parser.add_argument("--epochs", type=integer_in(1, 10**6), default=100, help="over the digits")
    parser.add_argument(
        "--batch-size", type=integer_in(1, 1437), default=64, help="digits in a step"
    )
    parser.add_argument("--latent", type=integer_in(1, PIXELS), default=12, help="size of a code")
    args = parser.parse_args(argv)
    parser.folder(args.output)
    make = OPTIMIZERS[args.optimizer]
    optimizer = make(args.learning_rate, weight_decay=args.weight_decay, mask=masks.matrices)

    images, held_out = digits()
    console = Console()
    console.print(f"{len(images)} training and {len(held_out)} held-out digits of 8x8 pixels")
    model_key, train_key, picture_key = jax.random.split(jax.random.key(args.seed), 3)
    start = time.perf_counter()
    model = VAE(args.latent, model_key)
    model, losses, bounds = train(
        model, optimizer, images, held_out, args.epochs, args.batch_size, train_key
    )
    seconds = time.perf_counter() - start
    if not math.isfinite(bounds[-1].total):
        parser.fail(f"diverged in epoch {len(losses)}; try another --learning-rate")

    names = (Column(name, justify="right") for name in ("negative ELBO", "reconstruction", "KL"))
    table = Table("held-out digits, nats per image", *names)
    for name, bound in (("before training", bounds[0]), ("after training", bounds[-1])):
        table.add_row(name, *(f"{float(x):.2f}" for x in (bound.total, *bound)))
    console.print(table)
    reconstructions, samples = reconstruct_and_sample(model, held_out[:64], picture_key)
    panels = {
        "Held-out digits": held_out[:64],
        "Their reconstructions": reconstructions,
        "Samples from the prior": samples,
    }
    picture = args.output / "vae.png"
    draw(picture, panels, losses, [float(bound.total) for bound in bounds])
    console.out(f"{args.optimizer}: {args.epochs} epochs in {seconds:.1f} s; picture: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
