"""The noise of random roundings: pinned by a checksum, and statistically sound."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adamaxw import _noise

slow = pytest.mark.slow

_N = 2**20
_PLACES = [(0, 0), (1, 0), (0, 1), (12345, 7), (2**31 - 1, 0), (2**31 - 1, 1000)]


def _noise_of(count, leaf, shape, seed=0):
    """The two halves side by side, as one uint32 per element."""
    index = jnp.stack([jnp.uint32(leaf)] * 2)
    high, low = _noise.draw(_noise.keys(jnp.uint32(seed), jnp.int32(count)), index, shape)
    return (high << 16) | low


@functools.cache
def _words(count, leaf, shape=(_N,)):
    return np.asarray(_noise_of(count, leaf, shape))


def _halves(words):
    return words >> 16, words & 0xFFFF


def test_noise_is_pinned():
    """The noise is part of what makes a run reproducible: a new version must not change it."""
    places = [(*place, (64, 64), seed) for place in _PLACES for seed in (0, 1, 2**32 - 1)]
    drawn = np.stack([_noise_of(*place) for place in places]).astype("<u4")
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "2595c68ac0d50cdd"
    seed = _noise.seed_of({"w": jnp.arange(6.0), "b": jnp.ones((2, 2), jnp.bfloat16)})
    assert (seed, _noise.next_seed(seed, jnp.int32(5))) == (1921246043, 812243061)
    indices = np.stack(_noise.indices(500))
    np.testing.assert_array_equal(indices[:, 0], np.arange(500))
    assert np.unique(indices).size == 1000


def test_noise_depends_on_the_row_major_index():
    """The noise of an element depends on its flat index, not on the shape, also under vmap."""
    for shape in [(), (0, 3), (5,), (3, 4, 5), (1, 7, 1)]:
        many = _words(9, 2, (100,))[: np.prod(shape, dtype=int)]
        np.testing.assert_array_equal(_words(9, 2, shape), many.reshape(shape))
    counts = np.array([0, 1, 77, 2**31 - 1], np.int32)
    draw = functools.partial(_noise_of, leaf=3, shape=(20,))
    np.testing.assert_array_equal(jax.vmap(draw)(counts), [_words(x, 3, (20,)) for x in counts])


def test_noise_and_seed_do_not_depend_on_the_mesh():
    """An array on eight devices has the noise and the seed of the same array on one."""
    place = NamedSharding(jax.make_mesh((4, 2), ("x", "y")), P("x", "y"))
    draw = jax.jit(functools.partial(_noise_of, 7, 3, (16, 8)), out_shardings=place)
    np.testing.assert_array_equal(draw(), _words(7, 3, (16, 8)))
    p = jnp.asarray(_words(7, 3, (16, 8)), jnp.float32)
    assert _noise.seed_of(p) == _noise.seed_of(jax.device_put(p, place))


def _assert_uniform(samples):
    """16-bit samples fill 256 bins as random ones do: chi-square to 5 standard deviations."""
    found = np.bincount(np.ravel(samples) >> 8, minlength=256)
    expected = np.size(samples) / 256
    assert abs(np.sum((found - expected) ** 2) / expected - 255) < 5 * np.sqrt(2 * 255)


def _assert_uncorrelated(a, b):
    r = np.corrcoef(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64))[0, 1]
    assert abs(r) < 5 / np.sqrt(np.size(a))


def _signs(words):
    """32 rows of the bits of words, as 1 and -1."""
    bits = (words[None, :] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
    return bits.astype(np.float32) * 2 - 1


@pytest.mark.parametrize("size", [2**14, pytest.param(_N, marks=slow)])
@pytest.mark.parametrize(("count", "leaf"), _PLACES)
def test_noise_is_uniform(count, leaf, size):
    """The high and the low bits of both halves are uniform, and each bit is balanced."""
    words = _words(count, leaf, (size,))
    for half in _halves(words):
        _assert_uniform(half)
        _assert_uniform((half & 0xFF) << 8)
    assert np.max(np.abs(np.mean(_signs(words), axis=1))) < 5 / np.sqrt(size)


@slow
@pytest.mark.parametrize("half", [0, 1])
def test_noise_is_uncorrelated(half):
    """No correlation along rows or columns, between steps, leaves or halves."""
    for count, leaf in [(0, 0), (1, 0), (12345, 3)]:
        here, later, beside = (
            _halves(_words(*place, (1024, 1024)))
            for place in ((count, leaf), (count + 1, leaf), (count, leaf + 1))
        )
        x = here[half]
        pairs = [here, (x, later[half]), (x, beside[half]), (x, later[1 - half])]
        pairs += [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1])]
        for a, b in (*pairs, *((x.ravel()[lag:], x.ravel()[:-lag]) for lag in range(1, 9))):
            _assert_uncorrelated(a, b)


@slow
@pytest.mark.parametrize("lag", [0, *(2**k for k in range(20))])
def test_bits_of_the_noise_are_independent(lag):
    """No bit is correlated with another one of its element, or of one a power of two away."""
    signs = _signs(_words(3, 1))
    n = _N - lag
    r = signs[:, :n] @ signs[:, lag:].T / n - (np.eye(32) if lag == 0 else 0)
    # 1024 pairs of bits at each of 21 lags.
    assert np.max(np.abs(r)) < 5.5 / np.sqrt(n)


@slow
@pytest.mark.parametrize("places", ["steps", "leaves"])
def test_noise_is_never_the_same_sequence(places):
    """4096 steps or leaves have no more words in common than chance predicts.

    If they shared one sequence, shifted or with XORed indices, some of the 8 million pairs would
    overlap, and each of those would share up to 4096 words.
    """

    def draw(i):
        return _noise_of(i, 0, (4096,)) if places == "steps" else _noise_of(5, i, (4096,))

    words = np.sort(np.ravel(jax.jit(jax.vmap(draw))(jnp.arange(4096, dtype=jnp.uint32))))
    expected = len(words) ** 2 / 2 / 2**32
    assert abs(np.sum(words[1:] == words[:-1]) - expected) < 6 * np.sqrt(expected)
