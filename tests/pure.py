"""The state of a Flax NNX model without its Variables."""

from flax import nnx

# Its name in Flax 0.12.0 is deprecated later.
as_pure = getattr(nnx, "as_pure", None) or nnx.pure
