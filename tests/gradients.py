"""Gradients of every kind that training meets, as float32 arrays of shape (steps, *shape)."""

import numpy as np

KINDS = ("normal", "heavy-tailed", "sparse", "spikes", "tiny", "huge", "zero", "every scale")


def gradients(kind, steps, shape, seed=0):
    """Returns `steps` gradients of a kind of `KINDS`."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(steps, *shape))
    if kind == "heavy-tailed":
        g = rng.standard_cauchy(size=g.shape)
    elif kind == "sparse":
        g *= rng.random(g.shape) < 0.002
    elif kind == "spikes":
        g[::1000] *= 1000
    elif kind == "tiny":
        g *= 1e-30
    elif kind == "huge":
        g *= 1e30
    elif kind == "zero":
        g *= 0
    elif kind == "every scale":
        g *= 10.0 ** rng.uniform(-12, 6, size=shape)
    return g.astype(np.float32)
