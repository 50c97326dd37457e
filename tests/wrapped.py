"""Optimizers in the wrappers of Optax, whose states tests save and convert."""

import jax
import jax.numpy as jnp
import optax

import adamaxw

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3), "s": jnp.ones(())}
SCHEDULE = optax.linear_schedule(0.05, 0.001, 40)
_HYPER = {"learning_rate": SCHEDULE, "weight_decay": 0.3}
_DECAYS = {"weight_decay": optax.linear_schedule(0.0, 0.3, 20)}


def matrices(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def maker(source=optax, **options):
    """`adamaxw` of Optax or of this package, with the signature that inject_hyperparams reads."""

    def make(learning_rate, b1=0.9, weight_decay=1e-4, mask=None):
        args = {"b1": b1, "weight_decay": weight_decay, "mask": mask, **options}
        return source.adamaxw(learning_rate, **args)

    return make


# Functions of such a `make`.
WRAPPERS = {
    "constants": lambda make: make(0.01),
    "mask": lambda make: make(**_HYPER, mask=matrices),
    "decay schedule": lambda make: make(SCHEDULE, mask=matrices, **_DECAYS),
    "chain": lambda make: optax.chain(optax.clip_by_global_norm(0.5), make(**_HYPER)),
    "nested chains": lambda make: optax.named_chain(
        ("trace", optax.trace(0.5)), ("x", optax.chain(optax.chain(make(1))))
    ),
    "masked": lambda make: optax.masked(make(**_HYPER), matrices),
    "partition": lambda make: optax.partition(
        {2: make(**_HYPER), 1: make(0.1, weight_decay=0.0), 0: optax.adam(0.1)},
        lambda params: jax.tree.map(lambda p: p.ndim, params),
    ),
    "MultiSteps": lambda make: optax.MultiSteps(optax.chain(optax.trace(0.9), make(**_HYPER)), 3),
    "apply_if_finite": lambda make: optax.apply_if_finite(make(**_HYPER), 2),
    "inject_hyperparams": lambda make: optax.inject_hyperparams(make)(0.01, weight_decay=0.3),
    "scheduled inject_hyperparams": lambda make: optax.chain(
        optax.clip(0.5),
        optax.inject_hyperparams(make, static_args="mask")(
            **_HYPER, b1=optax.linear_schedule(0.8, 0.95, 40), mask=matrices
        ),
    ),
    "flatten": lambda make: optax.flatten(make(**_HYPER)),
}


def parts(*before):
    """An optimizer made of the parts of optax.adamaxw, and the same of ours."""
    decay = optax.add_decayed_weights(0.3, mask=matrices)
    theirs = optax.scale_by_adamax(), decay, optax.scale_by_schedule(SCHEDULE), optax.scale(-1)
    ours = adamaxw.adamaxw(SCHEDULE, weight_decay=0.3, mask=matrices)
    return [optax.chain(*before, *middle, optax.clip(1e6)) for middle in (theirs, (ours,))]
