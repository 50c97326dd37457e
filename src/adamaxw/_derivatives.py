"""Derivatives of roundings: passed straight through or, for integer codes, refused."""

from typing import Any

import jax


@jax.custom_jvp
def straight_through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the derivatives of `exact`, a floating array of the same shape."""
    # The derivative of a rounding is 0 almost everywhere, which is useless for training; Bengio et
    # al., "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    # Computation", 2013 (https://arxiv.org/abs/1308.3432).
    del exact
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    _, rounded = primals
    return rounded, tangents[0].astype(rounded.dtype)


@jax.custom_jvp
def without_derivatives(codes: Any, sources: Any) -> Any:
    """`codes`; raises where derivatives are taken with respect to any of `sources`."""
    del sources
    return codes


@without_derivatives.defjvp
def _without_derivatives_jvp(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        'moment_dtype="uint8" stores integer codes, which carry no derivatives from step to step: '
        "to differentiate through update, use moment_dtype=None or bfloat16; to treat the moments "
        "as constants, apply jax.lax.stop_gradient to the gradients and hyperparameters"
    )
