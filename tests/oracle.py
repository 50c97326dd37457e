"""AdamaxW in NumPy float64: slow, readable, and not shipped."""

import numpy as np


def rms_error(got, exact):
    """Root mean square over steps and elements, each element in units of its own largest."""
    scale = np.max(np.abs(exact), axis=0) + 1e-300
    return np.sqrt(np.mean(np.abs((np.asarray(got) - exact) / scale) ** 2))


def octaves(got, exact):
    """How far two infinity norms are apart, element by element."""
    return np.abs(np.log2(np.asarray(got, np.float64) / exact))


class Oracle:
    """AdamaxW on one array, with the symbols of the papers.

    Kingma & Ba 2015, Algorithm 2, with eps inside the maximum; Loshchilov & Hutter 2019,
    Algorithm 2. `lr` and `wd` are numbers or functions of the number of updates done; `decays` is
    a boolean for all elements or one for each.
    """

    def __init__(
        self, p, lr, b1=0.9, b2=0.999, eps=1e-8, wd=1e-4, decays=True, scale_decay_by_lr=True
    ):
        self.p = np.asarray(p, np.result_type(np.asarray(p).dtype, np.float64))
        self.lr, self.b1, self.b2, self.eps, self.wd = lr, b1, b2, eps, wd
        self.decays, self.scale_decay_by_lr = decays, scale_decay_by_lr
        self.t = 0
        self.m = np.zeros_like(self.p)
        self.u = np.zeros(self.p.shape, np.float64)

    def step(self, g):
        """Takes a gradient, changes `p`, `m`, `u`, and returns the update of `p`."""
        g = np.asarray(g, self.m.dtype)
        lr = self.lr(self.t) if callable(self.lr) else self.lr
        wd = self.wd(self.t) if callable(self.wd) else self.wd
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.u = np.maximum(self.b2 * self.u, np.abs(g) + self.eps)
        m_hat = self.m / (1 - self.b1**self.t)
        decay = (lr if self.scale_decay_by_lr else 1.0) * wd * self.p
        update = -lr * m_hat / self.u - np.where(self.decays, decay, 0)
        self.p = self.p + update
        return update

    def run(self, gradients):
        """Takes gradients one by one; returns the history of (update, p, m, u), stacked."""
        history = [(self.step(g), self.p, self.m, self.u) for g in gradients]
        return tuple(np.stack(column) for column in zip(*history, strict=True))
