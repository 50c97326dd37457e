"""What the fuzz tests draw, and what counts as refused.

`FUZZ=50 pytest tests/test_fuzz*.py --hypothesis-seed=1` draws others than usual, 50 times as many.
"""

import os
import re
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import adamaxw
from adamaxw import AdamaxState
from adamaxw.moments import Moments

REFUSED = object()
_PACKAGE = Path(adamaxw.__file__).parent
_NAMED = re.compile(
    r"\b(learning_rate|b1|b2|eps|weight_decay|mask|moment_dtype|param_rounding|scale_decay_by_lr"
    r"|params|parameters|gradients|updates|state|like|moments|count|mu|nu|names|transposes|include"
    r"|exclude|minimum)\b"
)


def settings(max_examples):
    """Settings of a fuzz test; its fixtures are the same for all examples."""
    return hypothesis.settings(
        max_examples=max_examples * int(os.environ.get("FUZZ", "1")),
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def attempt(function, *args, **kwargs):
    """What a function returns, or REFUSED if it refuses its arguments with a clear error.

    That is a TypeError or ValueError which the package itself raises, and which names an argument,
    part of the state or parameters. Everything else is an error of the test.
    """
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")  # errors of JAX show that they are its own
    try:
        return function(*args, **kwargs)
    except (TypeError, ValueError) as error:
        frames = error.__traceback__
        while frames.tb_next is not None:
            frames = frames.tb_next
        raised_in = Path(frames.tb_frame.f_code.co_filename)
        if raised_in.parent != _PACKAGE or not _NAMED.search(str(error)):
            raise
        return REFUSED
    except OverflowError:  # of an integer that no array holds
        return REFUSED
    finally:
        jax.config.update("jax_traceback_filtering", before)


def traced(function, *args):
    """Its abstract result where arrays are traced, and what is no array is what it is."""
    leaves, treedef = jax.tree.flatten(args)
    is_array = [isinstance(x, np.ndarray | jax.Array) and is_numeric(x) for x in leaves]

    def call(arrays):
        arrays = iter(arrays)
        pairs = zip(is_array, leaves, strict=True)
        return function(*treedef.unflatten(next(arrays) if a else x for a, x in pairs))

    return jax.eval_shape(call, [x for a, x in zip(is_array, leaves, strict=True) if a])


def is_numeric(x):
    """Whether JAX has arrays like this one, and calls their elements numbers."""
    return any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.number, jnp.bool_))


# Objects that are no numbers, or numbers that not everything takes.


class Pair(NamedTuple):
    """A node of trees."""

    first: Any
    second: Any


_DTYPES = (
    *("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "complex64"),
    *("complex128", "int32", "int8", "uint8", "uint64", "int4", "bool"),
)
dtypes = st.sampled_from(_DTYPES).map(jnp.dtype)
numbers = (
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.9, 0.999, 1e-8, 1e-3, 1e-30, 1e30, 1e300, -1e300])
    | st.sampled_from([float("nan"), float("inf"), -float("inf"), 5e-324, 1e-45, 1 - 1e-9])
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**31, 2**70, 10**400, True, False, 1j, complex("nan")])
)
# Not long double and masked arrays: JAX refuses them, and we leave it to that.
_ODDITIES = [
    *(None, "", "text", "float32", b"bytes", (), [], {}, [1.0], (1.0, 2.0), {"a": 1.0}),
    *(object(), float, jnp.float32, np.float32, jnp.sin, Fraction(1, 3), Decimal("0.1")),
    *(timedelta(1), Ellipsis, NotImplemented, range(3), slice(None), frozenset()),
    *(np.str_("text"), np.bytes_(b"x"), np.array("text"), np.array(["a", "b"])),
    *(np.datetime64("2020-01-01"), np.array([1.0, None]), np.array(None), np.array(0.1, object)),
    *(np.zeros(2, [("x", "f4")]), np.zeros(2, jax.dtypes.float0)),
    *(np.zeros((2, 0)), np.zeros((1,) * 32), np.ones(1), np.ones((1, 1)), np.ones(3)),
]
# Not sampled_from them: it hashes, which some do not stand.
oddities = st.sampled_from(range(len(_ODDITIES))).map(_ODDITIES.__getitem__)


@st.composite
def scalars(draw):
    """Numbers in every carrier, and what is none."""
    value = draw(numbers)
    if draw(st.booleans()) or (isinstance(value, int) and abs(value) > 2**62):
        return value
    dtype = draw(dtypes)
    if isinstance(value, complex) and dtype.kind != "c":
        value = value.real
    with np.errstate(all="ignore"):
        scalar = np.asarray(value).astype(dtype)[()]
        carrier = draw(st.sampled_from([np.asarray, jnp.asarray, lambda x: x]))
        return carrier(scalar)


anything = (
    scalars()
    | oddities
    | st.builds(lambda: jax.random.key(0))
    | st.builds(
        lambda d, s: np.zeros(s, d), dtypes, st.sampled_from([(), (1,), (3,), (0,), (2, 3)])
    )
)

# Trees.


@st.composite
def trees(draw, leaves):
    """A tree of leaves in containers of every kind, and empty ones among them."""

    def extend(children):
        few = st.lists(children, max_size=3)
        return (
            few
            | few.map(tuple)
            | few.map(lambda xs: {f"key {i}": x for i, x in enumerate(xs)})
            | st.builds(Pair, children, children)
            | st.dictionaries(st.sampled_from(["w", "b", "a/b", "", "['w']"]), children, max_size=2)
        )

    kind = draw(st.sampled_from(["any", "any", "any", "any", "deep", "many"]))
    if kind == "any":
        return draw(st.recursive(leaves | st.none(), extend, max_leaves=5))
    leaf = draw(leaves)
    if kind == "many":
        return [leaf] * draw(st.sampled_from([40, 501]))
    for _ in range(draw(st.sampled_from([30, 300]))):
        leaf = [leaf]
    return leaf


def replace_leaf(draw, tree, values):
    """The tree with another thing in place of one leaf, drawn from `values`."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        return draw(values)
    leaves[draw(st.integers(0, len(leaves) - 1))] = draw(values)
    return treedef.unflatten(leaves)


# Values.


@st.composite
def floats_of(draw, shape, dtype):
    """An array of a floating dtype: of one kind, or of any bits."""
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "normal", "cauchy", "scales", "zero", "bits", "odd"]))
    x = rng.normal(size=shape)
    if kind == "bits":
        bits = rng.integers(0, 2 ** (8 * dtype.itemsize), size=shape, dtype=np.uint64)
        return np.asarray(bits).astype(f"u{dtype.itemsize}").view(dtype)
    if kind == "cauchy":
        x = rng.standard_cauchy(size=shape)
    elif kind == "scales":
        x = x * 10.0 ** rng.uniform(-50, 50, size=shape)
    elif kind == "zero":
        x = np.where(rng.random(size=shape) < 0.5, 0.0, -0.0)
    elif kind == "odd":
        odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 1e38, -3.4e38, 1e300, 1.0]
        x = rng.choice(odd, size=shape)
    with np.errstate(all="ignore"):
        return np.asarray(x).astype(dtype)


def codes_of(shape, dtype):
    """An array of codes: any, or all at one extreme."""
    info = np.iinfo(dtype)
    extremes = [info.min, info.min + 1, -1, 0, 1, info.max - 1, info.max]
    extreme = st.sampled_from([x for x in extremes if x >= info.min])
    seeds = st.integers(0, 2**32 - 1)
    return extreme.map(lambda x: np.full(shape, x, dtype)) | seeds.map(
        lambda seed: np.random.default_rng(seed).integers(
            info.min, info.max, size=shape, dtype=dtype, endpoint=True
        )
    )


# What is changed in one place.


@st.composite
def spoiled(draw, tree):
    """A tree with one thing about it that is wrong, or only odd."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return draw(anything)
    one = np.asarray(draw(st.sampled_from(leaves)))
    shapes = [one[..., None], one[None], np.ravel(one)[:1], np.zeros((3, 2), one.dtype)]
    nodes = [None, (one, one), [one], {"w": one}]
    kind = draw(st.sampled_from(["anything", "cast", "array", "whole", "more", "less"]))
    if kind == "anything":
        return replace_leaf(draw, tree, anything)
    if kind == "cast":
        return replace_leaf(draw, tree, dtypes.map(lambda dtype: _cast(one, dtype)))
    if kind == "array":
        others = st.sampled_from(range(9)).map([one, jnp.asarray(one), *shapes, *nodes].__getitem__)
        return replace_leaf(draw, tree, others)
    if kind == "whole" or not isinstance(tree, dict):
        return draw(anything)
    if kind == "more":
        return tree | {"more": draw(anything)}
    return dict(list(tree.items())[1:])


def _cast(x, dtype):
    with np.errstate(all="ignore"):
        return x.astype(dtype)


@st.composite
def spoiled_states(draw, state, others):
    """A state with one part that is wrong, or only odd, or that is from one of the `others`."""
    field = draw(st.sampled_from([*AdamaxState._fields, "swap", "of another", "type"]))
    if field == "swap":
        return state._replace(mu=state.nu, nu=state.mu)
    if field == "of another":
        other = draw(st.sampled_from(others))
        part = draw(st.sampled_from([*AdamaxState._fields, "all"]))
        return other if part == "all" else state._replace(**{part: getattr(other, part)})
    if field == "type":
        as_moments = Moments(state.count, state.mu, state.nu, state.residual)
        types = [tuple(state), list(state), state._asdict(), as_moments, (state,)]
        return draw(st.sampled_from(range(5)).map(types.__getitem__))
    return state._replace(**{field: draw(spoiled(getattr(state, field)))})
