"""The state of the optimizers."""

from typing import Any, NamedTuple

import jax.export


class AdamaxState(NamedTuple):
    """State of `adamaxw` and `adamax`; structure, shapes and dtypes stay as `init` made them.

    Attributes:
        count: int32 scalar, the number of updates done; it stays at 2**31 - 1 when it gets there.
        mu: first moments, with the structure, shapes and shardings of params. With
            `moment_dtype=None` float32 for parameters of up to 32 bits, float64 for float64,
            complex for complex ones; else bfloat16, or int8 codes. Integer and boolean parameters
            do not train; in their place are zeros of their dtype.
        nu: infinity norms, like `mu`, but real for complex parameters; bfloat16, or uint8 codes.
        nu_scale: float32 scalar, the unit of `nu` in the whole tree; None with `moment_dtype=None`.
        residual: with `param_rounding="exact"` a tree like params: int16 beside each bfloat16
            parameter, zeros of int8 beside the others. None where it would have no int16.
        seed: uint32 scalar, of which the noise of this run is made, a hash of the parameters at
            `init`; None where nothing is rounded at random. Other values give other noise.

    `adamaxw.moments.unpack` reads the moments, `adamaxw.moments.master_params` the parameters.
    """

    count: Any  # pyright: ignore[reportIncompatibleMethodOverride]  (tuple.count)
    mu: Any
    nu: Any
    nu_scale: Any = None
    residual: Any = None
    seed: Any = None


# So that `jax.export` can write a compiled step that takes a state.
jax.export.register_namedtuple_serialization(AdamaxState, serialized_name="adamaxw.AdamaxState")
