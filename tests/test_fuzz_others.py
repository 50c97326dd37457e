"""Any masks, states of PyTorch and checkpoints: right, or a clear error."""

import copy
import pickle
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equality import assert_equal
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    REFUSED,
    anything,
    attempt,
    replace_leaf,
    settings,
    trees,
)

import adamaxw
from adamaxw import masks, moments

pytestmark = [
    pytest.mark.usefixtures("compile_fast"),
    # Of NumPy, where a leaf is a Python number that becomes inf in float32.
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
]

_PATTERNS = st.sampled_from(["", "w", "^w$", "nothing", "[", "(?P<", "a/b", "\\", "key|w", ".*"])
_BOOLEANS = st.booleans() | st.booleans().map(np.bool_) | st.booleans().map(jnp.asarray)
_FUNCTIONS = st.sampled_from(
    [masks.matrices, ~masks.rank(1), lambda _: True, lambda _: None, lambda p: p, lambda _: [0]]
)
_ARRAYS = st.sampled_from([np.zeros((2, 3), np.float32), np.zeros(2, np.int32), np.float32(1)])


@settings(150)
@given(trees(_ARRAYS | anything.filter(lambda x: not isinstance(x, type))), st.data())
def test_any_mask(params, data):
    """As many booleans as leaves, from what `describe` shows too, or a mask refused by name."""
    draw = data.draw
    make = draw(st.sampled_from(["matching", "rank", "tree", "function", "combination", "any"]))
    if make == "matching":
        arguments = st.lists(_PATTERNS, max_size=2) | _PATTERNS | anything
        mask = attempt(masks.matching, draw(arguments), draw(arguments))
    elif make == "rank":
        mask = attempt(masks.rank, draw(st.integers(-1, 3) | anything))
    elif make == "tree":
        mask = jax.tree.map(lambda _: draw(_BOOLEANS), params)
        if draw(st.booleans()):
            mask = replace_leaf(draw, mask, _BOOLEANS | anything | st.just({"w": True}))
    elif make == "function":
        mask = draw(_FUNCTIONS)
    elif make == "combination":
        mask = draw(_FUNCTIONS) & masks.matrices | ~masks.matching(draw(st.sampled_from(["", "w"])))
    else:
        mask = draw(anything.filter(lambda x: not callable(x)))
    if mask is REFUSED or (make == "tree" and callable(mask)):
        return  # What an odd function raises is its own.
    leaves = jax.tree.leaves(params)
    if isinstance(mask, masks.Mask):
        chosen = attempt(mask, params)
        if chosen is not REFUSED and chosen is not None and jax.tree.leaves(chosen):
            assert jax.tree.structure(chosen) == jax.tree.structure(params)
            assert all(type(x) is bool for x in jax.tree.leaves(chosen))
    table = attempt(masks.describe, params, mask)
    if table is not REFUSED:
        assert len(table.rows) == len(leaves)
        assert len(str(table).splitlines()) == len(leaves) + 4
    opt = adamaxw.adamaxw(1e-3, mask=mask) if not isinstance(mask, bool | np.bool_) else None
    state = opt and attempt(opt.init, params)
    if state is REFUSED or table is REFUSED:
        # Without leaves there is nothing to mask, and init does not look.
        assert opt is None or (state is REFUSED) == (table is REFUSED) or not leaves


# PyTorch.


def _torch_state():
    def slots(shape):
        return {"step": 7, "exp_avg": np.ones(shape), "exp_inf": np.full(shape, 2.0)}

    return {
        "state": {0: slots((2, 3)), 1: slots((2,))},
        "param_groups": [{"lr": 0.1, "params": [0, 1], "param_names": ["w", "b"]}],
    }


def _flat_state():
    slots = _torch_state()["state"]
    return {f"state.{i}.{name}": x for i, values in slots.items() for name, x in values.items()}


_TORCH_PARAMS = {"b": np.zeros(2, np.float32), "w": np.zeros((3, 2), np.float32)}
_STEPS = st.sampled_from([0, 7.0, np.float32(7), np.array([7]), np.int64(8)])
_AXES = st.sampled_from([(), (0,), (0, 1), (1, 0)])
_NAMES = st.sampled_from(["w", "b", "0", "x", 0, 1, 2, -1, None])
_SLOTS = st.builds(
    np.ones,
    st.sampled_from([(), (2,), (2, 3), (3, 2), (2, 3, 1)]),
    st.sampled_from(["float16", "float32", "float64", jnp.bfloat16, "int32", "complex64"]),
)


@st.composite
def _changed(draw, tree):
    """Nested dicts with another value of its kind somewhere, or a key less, or one more."""
    tree = copy.copy(tree)
    key = draw(st.sampled_from(list(tree)))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "less", "more"]))
    if kind == "less":
        del tree[key]
    elif kind == "more":
        # Of dicts with keys of several types JAX makes no trees.
        other = ["more", "state.0.more", "x.y.z"] if isinstance(key, str) else [3, "more", None]
        tree[draw(st.sampled_from(other))] = tree[key]
    elif isinstance(tree[key], dict):
        tree[key] = draw(_changed(tree[key]))
    elif str(key).endswith("step"):
        tree[key] = draw(_STEPS)
    elif isinstance(tree[key], np.ndarray):
        tree[key] = draw(_SLOTS)
    elif isinstance(tree[key], tuple):
        tree[key] = draw(_AXES)
    elif not isinstance(tree[key], list):
        tree[key] = draw(_NAMES)
    return tree


@settings(150)
@given(st.data())
def test_any_state_of_torch(data):
    """What is read is what the dict has, in the shapes of params, or is refused by name."""
    draw = data.draw
    arguments = {
        "state": draw(st.sampled_from([_torch_state(), _flat_state()])),
        "params": _TORCH_PARAMS,
        "names": draw(
            st.sampled_from([{"w": 0, "b": 1}, {"w": "0", "b": "1"}, {"w": 0, "b": None}])
        ),
        "transposes": {"w": (1, 0)},
    }
    for name in draw(st.lists(st.sampled_from(list(arguments)), max_size=2, unique=True)):
        arguments[name] = draw(_changed(arguments[name]))
    new = attempt(moments.from_torch, **arguments)
    if new is REFUSED:
        return
    assert (new.count.shape, new.count.dtype) == ((), jnp.int32)
    assert jax.tree.structure(new.mu) == jax.tree.structure(new.nu)
    assert jax.tree.structure(new.mu) == jax.tree.structure(arguments["params"])
    assert attempt(moments.pack, new) is not REFUSED


# Checkpoints.


@settings(4)
@given(st.data())
def test_what_comes_back_from_a_checkpoint(data):
    """Pickled, by Flax, as NumPy arrays, a state goes on alike; plain containers are refused."""
    draw = data.draw
    static = {
        "moment_dtype": draw(st.sampled_from([None, "bfloat16", "uint8"])),
        "param_rounding": draw(st.sampled_from(["nearest", "exact"])),
    }
    opt = adamaxw.adamaxw(1e-2, **static)
    params = {"w": jnp.ones(3), "h": (jnp.ones(2, jnp.bfloat16), jnp.arange(2))}
    gradients = jax.tree.map(lambda p: p * draw(st.sampled_from([0, 1, 2])), params)
    _, state = opt.update(gradients, opt.init(params), params)
    as_dict = flax.serialization.to_state_dict(state)
    as_bytes = flax.serialization.to_bytes(state)
    for same in (
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        flax.serialization.from_state_dict(opt.init(params), as_dict),
        flax.serialization.from_bytes(opt.init(params), as_bytes),
        jax.tree.map(np.asarray, state),
        adamaxw.AdamaxState(**state._asdict()),
        adamaxw.AdamaxState(*tuple(state)),
    ):
        assert_equal(*(opt.update(gradients, s, params) for s in (state, same)))
    for other in (as_dict, as_bytes, state._asdict(), tuple(state), list(state), {"state": state}):
        assert attempt(opt.update, gradients, other, params) is REFUSED
        assert attempt(moments.unpack, other) is REFUSED
        assert attempt(moments.convert, other, state) is REFUSED
    lists = adamaxw.AdamaxState(*map(_as_lists, tuple(state)))
    assert attempt(opt.update, gradients, lists, params) is REFUSED


def _as_lists(tree: Any) -> Any:
    """The tree with lists for tuples, as JSON and msgpack give them back."""
    if isinstance(tree, dict):
        return {key: _as_lists(x) for key, x in tree.items()}
    return list(map(_as_lists, tree)) if isinstance(tree, tuple) else tree
