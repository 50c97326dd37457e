"""Eight small tasks for `few_bits.py`, each a function of an optimizer to the loss at its end.

The key makes the data, the initial parameters and the batches. In the last three tasks gradients
have no noise.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random


def descend(opt: Any, gradient: Callable[..., Any], params: Any, items: Any) -> Any:
    """The params after a step for each of `items`, which `gradient` is given with the params."""

    def step(carry: Any, item: Any) -> tuple[Any, None]:
        params, state = carry
        updates, state = opt.update(gradient(params, item), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, opt.init(params)), items)[0][0]


def word2vec(opt: Any, key: Any, steps: int) -> jax.Array:
    """Skip-grams with 5 negative samples, of words from a Zipf law; the loss of all pairs."""
    words, width, batch, negatives = 256, 16, 64, 5
    keys = random.split(key, 3)
    topic = random.normal(keys[0], (words, 4))
    frequency = 1 / jnp.arange(1.0, words + 1)
    frequency /= frequency.sum()
    follows = jax.nn.softmax(jnp.log(frequency) + topic @ topic.T / 2)
    up_to, follows_up_to = jnp.cumsum(frequency[:-1]), jnp.cumsum(follows[:, :-1], axis=1)
    start = random.uniform(keys[1], (words, width), minval=-0.5, maxval=0.5) / width

    def loss(params: Any, key: Any) -> jax.Array:
        chance = random.uniform(key, (batch, 2 + negatives))
        center = jnp.searchsorted(up_to, chance[:, 0])
        other = jax.vmap(jnp.searchsorted)(follows_up_to[center], chance[:, 1])
        u, v = params[0][center], params[1]
        hit = jax.nn.softplus(-jnp.sum(u * v[other], axis=1))
        noise = v[jnp.searchsorted(up_to, chance[:, 2:])]
        miss = jax.nn.softplus(jnp.einsum("bd,bnd->bn", u, noise))
        return jnp.mean(hit + miss.sum(axis=1))

    params = [start, jnp.zeros((words, width))]
    u, v = descend(opt, jax.grad(loss), params, random.split(keys[2], steps))
    score = u @ v.T
    pairs = follows * jax.nn.softplus(-score) + negatives * frequency * jax.nn.softplus(score)
    return frequency @ pairs.sum(axis=1)


def language_model(opt: Any, key: Any, steps: int) -> jax.Array:
    """A transformer of one layer on the source of `argparse`; held-out nats per byte."""
    width, context, batch = 32, 16, 16
    text = np.minimum(np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8), 127)
    windows = jnp.asarray(np.lib.stride_tricks.sliding_window_view(text, context + 1), jnp.int32)
    split = len(windows) * 9 // 10
    shapes = {"in": (128, width), "place": (context, width), "qkv": (width, 3 * width)}
    shapes |= {"mix": (width, width), "up": (width, 64), "down": (64, width), "out": (width, 128)}
    keys = random.split(key, len(shapes) + 1)
    params = {
        name: random.normal(k, shape) / math.sqrt(width)
        for k, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    mask = jnp.where(jnp.tri(context, dtype=bool), 0, -1e9)

    def loss(params: Any, window: jax.Array) -> jax.Array:
        h = params["in"][window[:, :-1]] + params["place"]
        q, k, v = jnp.split(h @ params["qkv"], 3, axis=2)
        h += jax.nn.softmax(q @ k.mT / math.sqrt(width) + mask) @ v @ params["mix"]
        h += jax.nn.relu(h @ params["up"]) @ params["down"]
        log_p = jax.nn.log_softmax(h @ params["out"])
        return -jnp.mean(jnp.take_along_axis(log_p, window[:, 1:, None], axis=2))

    def gradient(params: Any, key: Any) -> Any:
        rows = random.randint(key, (batch,), 0, split - context)
        return jax.grad(loss)(params, windows[rows])

    return loss(descend(opt, gradient, params, random.split(keys[-1], steps)), windows[split::32])


def logistic_regression(opt: Any, key: Any, steps: int) -> jax.Array:
    """20 features of different scales, batches of 32; the loss above its minimum."""
    keys = random.split(key, 4)
    x = random.normal(keys[0], (2000, 20)) * jnp.logspace(-1, 0.5, 20)
    log_odds = x @ random.normal(keys[2], (20,))
    y = jnp.where(random.bernoulli(keys[1], jax.nn.sigmoid(log_odds)), 1.0, -1.0)

    def loss(w: jax.Array, rows: Any = slice(None)) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-y[rows] * (x[rows] @ w)))

    def gradient(w: jax.Array, key: Any) -> jax.Array:
        return jax.grad(loss)(w, random.randint(key, (32,), 0, len(x)))

    def newton(_: Any, w: jax.Array) -> jax.Array:
        return w - jnp.linalg.solve(jax.hessian(loss)(w), jax.grad(loss)(w))

    best = jax.lax.fori_loop(0, 12, newton, jnp.zeros(20))
    w = descend(opt, gradient, jnp.zeros(20), random.split(keys[3], steps))
    return loss(w) - loss(best)


def reinforce(opt: Any, key: Any, steps: int) -> jax.Array:
    """A random world of 16 states and 4 actions; what the return lacks of the best."""
    states, actions, horizon, batch = 16, 4, 10, 32
    keys = random.split(key, 3)
    log_p = 3 * random.normal(keys[0], (states, actions, states))
    moves, reward = jax.nn.softmax(log_p), random.uniform(keys[1], (states, actions))

    def loss(logits: jax.Array, key: Any) -> jax.Array:
        def act(state: jax.Array, key: Any) -> Any:
            k1, k2 = random.split(key)
            action = random.categorical(k1, logits[state])
            log_chance = jax.nn.log_softmax(logits[state])[jnp.arange(batch), action]
            step = log_chance, reward[state, action]
            return random.categorical(k2, log_p[state, action]), step

        first, then = random.split(key)
        state = random.randint(first, (batch,), 0, states)
        _, (log_chances, rewards) = jax.lax.scan(act, state, random.split(then, horizon))
        to_come = jnp.cumsum(rewards[::-1], axis=0)[::-1]
        advantage = to_come - to_come.mean(axis=1, keepdims=True)
        return -jnp.sum(log_chances * advantage) / batch

    start = jnp.zeros((states, actions))
    logits = descend(opt, jax.grad(loss), start, random.split(keys[2], steps))

    def back(_: Any, values: Any) -> Any:
        best, ours = (reward + moves @ value for value in values)
        return best.max(axis=1), jnp.sum(jax.nn.softmax(logits) * ours, axis=1)

    best, ours = jax.lax.fori_loop(0, horizon, back, (jnp.zeros(states), jnp.zeros(states)))
    return jnp.mean(best - ours)


def saddle_point(opt: Any, key: Any, steps: int) -> jax.Array:
    """Noisy min over x, max over y of x'Ay + (|x|^2 - |y|^2) / 2 + b'x + c'y; squared distance."""
    n = 10
    keys = random.split(key, 3)
    a, (b, c) = random.normal(keys[0], (n, n)), random.normal(keys[1], (2, n))

    def gradient(z: Any, key: Any) -> Any:
        noise = random.normal(key, (2, n))
        return [a @ z[1] + z[0] + b + noise[0], z[1] - a.T @ z[0] - c + noise[1]]

    z = descend(opt, gradient, [jnp.zeros(n), jnp.zeros(n)], random.split(keys[2], steps))
    exact = jnp.linalg.solve(jnp.block([[jnp.eye(n), a], [-a.T, jnp.eye(n)]]), jnp.append(-b, c))
    return jnp.mean((jnp.concatenate(z) - exact) ** 2)


def whole_batch(opt: Any, loss: Callable[[Any], jax.Array], params: Any, steps: int) -> jax.Array:
    """The loss at the end of training without noise."""
    return loss(descend(opt, lambda params, _: jax.grad(loss)(params), params, jnp.arange(steps)))


def network(key: Any, sizes: tuple[int, ...]) -> list[Any]:
    """Matrices and biases."""
    triples = zip(random.split(key, len(sizes) - 1), sizes, sizes[1:], strict=False)
    return [(random.normal(k, (n, m)) / math.sqrt(n), jnp.zeros(m)) for k, n, m in triples]


def apply(params: list[Any], x: jax.Array) -> jax.Array:
    """The one output of a network, with tanh between the layers."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return (x @ params[-1][0] + params[-1][1])[..., 0]


def pinn(opt: Any, key: Any, steps: int) -> jax.Array:
    """The residual of u'' = f on 32 points of [0, 1], relative to f; u is 0 at both ends."""
    keys = random.split(key)
    x = jnp.linspace(0, 1, 32)
    f = jnp.sin(jnp.pi * x[:, None] * jnp.arange(1.0, 4)) @ random.normal(keys[0], (3,))

    def u(x: jax.Array, params: Any) -> jax.Array:
        return x * (1 - x) * apply(params, x[None])

    def loss(params: Any) -> jax.Array:
        curvature = jax.vmap(jax.grad(jax.grad(u)), (0, None))(x, params)
        return jnp.mean((curvature - f) ** 2) / jnp.mean(f**2)

    return whole_batch(opt, loss, network(keys[1], (1, 24, 24, 1)), steps)


def regression(opt: Any, key: Any, steps: int) -> jax.Array:
    """A network of two hidden layers on 128 points of a smooth function."""
    keys = random.split(key, 3)
    x = random.uniform(keys[0], (128, 2), minval=-1, maxval=1)
    y = jnp.sin(2 * x @ random.normal(keys[1], (2, 3))).sum(axis=1)
    start = network(keys[2], (2, 32, 32, 1))
    return whole_batch(opt, lambda params: jnp.mean((apply(params, x) - y) ** 2), start, steps)


def factorization(opt: Any, key: Any, steps: int) -> jax.Array:
    """A matrix of 40 x 30 and rank 3, of which 60% are seen."""
    keys = random.split(key, 5)
    exact = random.normal(keys[0], (40, 3)) @ random.normal(keys[1], (3, 30))
    seen = random.bernoulli(keys[2], 0.6, exact.shape).astype(jnp.float32)
    start = [0.1 * random.normal(keys[3], (40, 3)), 0.1 * random.normal(keys[4], (3, 30))]

    def loss(params: Any) -> jax.Array:
        return jnp.sum(seen * (params[0] @ params[1] - exact) ** 2) / seen.sum()

    return whole_batch(opt, loss, start, steps)


class Task(NamedTuple):
    """Something to train: from an optimizer, a key and the number of steps to the loss."""

    train: Callable[[Any, Any, int], jax.Array]
    lr: float
    steps: int
    seeds: int = 12


TASKS = {
    "word2vec": Task(word2vec, 0.03, 2000),
    "language model": Task(language_model, 0.02, 600),
    "logistic regression": Task(logistic_regression, 0.01, 3000),
    "REINFORCE": Task(reinforce, 0.05, 600),
    "saddle point": Task(saddle_point, 0.01, 5000),
    "PINN": Task(pinn, 0.005, 5000, 24),
    "regression": Task(regression, 0.005, 5000, 24),
    "matrix factorization": Task(factorization, 0.02, 3000, 24),
}
