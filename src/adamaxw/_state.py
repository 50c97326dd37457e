"""The state of the optimizers."""

from typing import Any, NamedTuple

import jax.export


class AdamaxState(NamedTuple):
    """State of `adamaxw` and `adamax`; structure, shapes and dtypes stay as `init` made them.

    Attributes:
        count: int32 scalar, the number of updates done; it saturates at 2**31 - 1.
        mu: first moments, with the structure, shapes and shardings of params. With
            `moment_dtype=None` float32, float64 for float64 and complex for complex parameters;
            otherwise bfloat16, or int8 codes. Integer parameters have zeros of their dtype.
        nu: infinity norms, like `mu`, but real; otherwise bfloat16, or uint8 codes.
        nu_scale: float32 scalar, the unit of `nu` in the whole tree; None with `moment_dtype=None`.
        residual: with `param_rounding="exact"` a tree like params: int16 beside each bfloat16
            parameter, int8 zeros beside the others. None where no parameter needs int16.
        seed: uint32 scalar, the seed of this run's noise, a hash of the parameters at `init`; None
            with `moment_dtype=None`, unless `param_rounding` is "stochastic".

    `adamaxw.moments.unpack` reads the moments, `adamaxw.moments.master_params` the parameters.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.count)
    mu: Any
    nu: Any
    nu_scale: Any = None
    residual: Any = None
    seed: Any = None


def is_state(x: Any) -> bool:
    """Whether `x` is an AdamaxState: the `is_leaf` that finds those in a tree of wrappers."""
    return isinstance(x, AdamaxState)


# So that `jax.export` can serialize a compiled step that takes a state.
jax.export.register_namedtuple_serialization(AdamaxState, serialized_name="adamaxw.AdamaxState")
