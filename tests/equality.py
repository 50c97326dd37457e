"""Whether two trees of arrays are the same, in type or in value."""

import jax
import numpy as np

# XLA contracts a product and a sum to one fused multiply-add, which rounds once, as suits the loop
# that it makes for a shape. With this in XLA_FLAGS it has none: formulas are computed as written.
WITHOUT_FUSED_MULTIPLY_ADD = "--xla_cpu_max_isa=AVX"


def types_of(tree):
    """Structure, shape, dtype, weak type and sharding type of every leaf."""
    return jax.tree.map(jax.typeof, tree)


def assert_equal(a, b):
    """Bit for bit, with dtypes: NaN equals itself, and 0 does not equal -0."""

    def compare(x, y):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), (x, y)

    jax.tree.map(compare, a, b)


def assert_equal_but_for_last_bits(a, b):
    """Codes and bfloat16 are equal; float32 and the low bits of a master weight up to rounding.

    In two programs XLA contracts products and sums differently. The chance that a code or a
    bfloat16 tips over with that is below 1e-5 for each. An element near zero was as large as the
    others of its leaf some steps ago, and keeps what was rounded then: four times at most half of
    the last bit of the largest.
    """

    def compare(x, y):
        assert x.dtype == y.dtype
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.float32:
            atol = 1e-8 + 2.0**-22 * np.max(np.abs(y), initial=0)
            np.testing.assert_allclose(x, y, rtol=3e-6, atol=atol)
        elif x.dtype == np.int16:
            assert np.max(np.abs(x.astype(int) - y.astype(int))) <= 16
        else:
            np.testing.assert_array_equal(x, y)

    jax.tree.map(compare, a, b)
