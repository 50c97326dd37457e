"""Derivatives through rounding: they pass straight through or, for integer codes, are refused."""

from typing import Any

import jax


@jax.custom_jvp
def straight_through(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the derivatives of `exact`.

    The derivative of a rounding is 0 almost everywhere, which is no use to anyone who trains
    through it; Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013 (https://arxiv.org/abs/1308.3432).

    Args:
        exact: floating, of the shape of `rounded`. Of its value nothing is used.
        rounded: floating.
    """
    del exact
    return rounded


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    _, rounded = primals
    return rounded, tangents[0].astype(rounded.dtype)


@jax.custom_jvp
def without_derivatives(codes: Any, sources: Any) -> Any:
    """`codes`; an error where derivatives are taken with respect to any of `sources`."""
    del sources
    return codes


@without_derivatives.defjvp
def _without_derivatives_jvp(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        'moment_dtype="uint8" stores integer codes, which carry no derivatives from one step to '
        "the next: to differentiate through update, use moment_dtype=None or bfloat16; to treat "
        "the moments as constants, apply jax.lax.stop_gradient to the gradients and the "
        "hyperparameters first"
    )
