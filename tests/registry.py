"""Formats, roundings, and trainings to compare with float64, for the tests of the numerics.

A `Case` is a training of thousands of steps on gradients of every kind, which is never synchronised
with the oracle. `run` trains with hyperparameters that may change at every step, in one compiled
program per format.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gradients import KINDS, gradients
from jax import lax
from modes import apply_updates
from oracle import Oracle

import adamaxw
from adamaxw import moments

FORMATS = (None, "bfloat16", "uint8")
CONFIGS = list(itertools.product(FORMATS, ("nearest", "stochastic", "exact")))

ULP = 2.0**-24
# The largest error of a norm in octaves: half a level of uint8 and half a unit in the last place of
# bfloat16, with what float32 adds; in float32 a rounding error of each of 3000 steps.
HALF_STEP = 1 / 12 + 2e-5
NORM_BOUND = {None: 8 * ULP * np.sqrt(3000), "bfloat16": np.log2(1 + 2**-8), "uint8": HALF_STEP}

STEPS, LANES = 3000, 64
HYPER = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "scale_decay_by_lr": False}
# The lanes of a case: each kind of gradient, gradients that end, and one that is not finite.
LANES_OF = {kind: slice(i * LANES, (i + 1) * LANES) for i, kind in enumerate((*KINDS, "ending"))}
FINITE = slice(0, LANES * len(LANES_OF))
BAD = slice(FINITE.stop, FINITE.stop + LANES)
BAD_STEP = 100
BAD_BITS = (0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F810000, 0x7F800000, 0xFF800000)


def learning_rate(count):
    """The schedule of all cases."""
    return 1e-2 / (1 + 0.01 * count.astype(jnp.float32))


class Case(NamedTuple):
    """How a training of the registry is set up."""

    dtype: str
    moment_dtype: str | None = None
    param_rounding: str = "nearest"
    grad_dtype: str = "float32"

    def __str__(self):
        return " ".join(map(str, self))

    def optimizer(self, **hyperparameters):
        """The optimizer, by default with the hyperparameters of all cases."""
        return adamaxw.adamaxw(
            **{"learning_rate": learning_rate, "weight_decay": 1e-4} | HYPER | hyperparameters,
            moment_dtype=self.moment_dtype,
            param_rounding=self.param_rounding,
        )


CASES = [
    *(Case("float32", name) for name in FORMATS),
    *(Case("bfloat16", *config) for config in CONFIGS),
    Case("float16", None, "nearest"),
    Case("float16", "uint8", "stochastic"),
    Case("bfloat16", "bfloat16", "exact", "bfloat16"),
]


@functools.cache
def problem():
    """Parameters, half of them near zero, and gradients: float32 values that bfloat16 can hold."""
    rng = np.random.default_rng(1)
    p = rng.normal(size=BAD.stop) * np.where(np.arange(BAD.stop) % 2, 1.0, 1e-3)
    p[:4] = 0.0, -0.0, 1e-20, -1e-20
    columns = [gradients(kind, STEPS, (LANES,), seed) for seed, kind in enumerate(KINDS)]
    ending = gradients("normal", STEPS, (LANES,), 100)
    ending[200:] = 0
    # In the range of uint8, and in each bad lane one value that is not finite.
    g = np.clip(np.concatenate([*columns, ending, columns[0]], axis=1), -6e4, 6e4)
    g[BAD_STEP, BAD] = np.resize(np.array(BAD_BITS, np.uint32).view(np.float32), LANES)
    return tuple((x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in (np.float32(p), g))


class History(NamedTuple):
    """At each step: parameters (master weights if there are any), and both moments."""

    params: np.ndarray
    m: np.ndarray
    u: np.ndarray


@functools.cache
def trained(case):
    """The history of a case, its last params and its last state."""
    opt = case.optimizer()

    def step(carry, g):
        params, state = carry
        updates, state = opt.update(g, state, params)
        params = apply_updates(params, updates)
        master = moments.master_params(params, state).astype(jnp.float32)
        return (params, state), History(master, *moments.unpack(state)[1:3])

    p, g = map(jnp.asarray, problem())
    p, g = p.astype(case.dtype), g.astype(case.grad_dtype)
    (params, state), history = jax.jit(lambda *args: lax.scan(step, *args))((p, opt.init(p)), g)
    return jax.tree.map(np.asarray, history), params, state


@functools.cache
def exact():
    """The history of the oracle, for the lanes that are finite."""
    p, g = problem()
    rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(STEPS)), np.float64)
    oracle = Oracle(p[FINITE], lambda t: rates[t], wd=1e-4, **HYPER)
    return History(*oracle.run(g[:, FINITE])[1:])


RUN_STEPS, RUN_LANES = 2000, 128


class Rates(NamedTuple):
    """Hyperparameters of `run`: numbers, or arrays with one per step."""

    learning_rate: object = 1e-3
    b1: object = 0.9
    b2: object = 0.999
    eps: object = 1e-8


DEFAULTS = Rates()


@functools.cache
def _runner(moment_dtype):
    def step(state, item):
        g, rates = item
        updates, state = adamaxw.adamax(*rates, moment_dtype=moment_dtype).update(g, state)
        return state, (updates, *moments.unpack(state)[1:3])

    return jax.jit(lambda state, *items: lax.scan(step, state, items))


def run(moment_dtype, g, rates=DEFAULTS, state=None):
    """Adamax with traced hyperparameters on up to RUN_STEPS gradients of up to RUN_LANES elements.

    Returns the histories of updates and of both moments, of the shape of `g`, and the last state.
    """
    steps, lanes = np.shape(g)
    given = np.zeros((RUN_STEPS, RUN_LANES), np.float32)
    given[:steps, :lanes] = g
    rates = Rates(*(np.broadcast_to(np.float32(x), RUN_STEPS) for x in rates))
    if state is None:
        eps = max(float(rates.eps[0]), 1e-10)
        opt = adamaxw.adamax(1e-3, eps=eps, moment_dtype=moment_dtype)
        state = opt.init(jnp.zeros(RUN_LANES))
    state, history = _runner(moment_dtype)(state, given, rates)
    return *(np.asarray(x)[:steps, :lanes] for x in history), state


def oracle_of(g, rates=DEFAULTS):
    """The float64 histories of updates and both moments that `run` approximates."""
    steps, lanes = np.shape(g)
    lr, b1, b2, eps = (np.broadcast_to(np.float32(x), steps).astype(np.float64) for x in rates)
    oracle = Oracle(np.zeros(lanes), lr=lambda t: lr[t], wd=0.0)
    history = []
    for t, g_t in enumerate(g):
        oracle.b1, oracle.b2, oracle.eps = b1[t], b2[t], eps[t]
        history.append((oracle.step(g_t), oracle.m, oracle.u))
    return map(np.stack, zip(*history, strict=True))
