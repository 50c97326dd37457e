"""Resuming from torch.optim.Adamax, beside what it did itself: see make_torch_adamax.py."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, types_of
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from modes import x64
from safetensors.numpy import load_file

import adamaxw
from adamaxw.moments import convert, from_torch

_FIXTURES = Path(__file__).parent / "fixtures"
_STEPS = 20

# The parameters of PyTorch in their order: which leaf each is, and how it lies there.
_LEAVES = {
    "conv.weight": ("conv/kernel", (2, 3, 1, 0)),
    "conv.bias": ("conv/bias", None),
    "dense.weight": ("dense/kernel", (1, 0)),
    "dense.bias": ("dense/bias", None),
}
_NAMES = {path: i for i, (path, _) in enumerate(_LEAVES.values())}
_OWN_NAMES = {path: name for name, (path, _) in _LEAVES.items()}
_TRANSPOSES = {path: axes for path, axes in _LEAVES.values() if axes}

with np.load(_FIXTURES / "torch_adamax.npz") as _file:
    _ARRAYS = dict(_file)


def _state(run="plain") -> dict[str, Any]:
    """A state_dict with arrays in place of tensors."""
    slots = ("step", "exp_avg", "exp_inf")
    state = {i: {slot: _ARRAYS[f"{run}/state/{i}/{slot}"] for slot in slots} for i in range(4)}
    group = {"lr": 0.01, "params": [0, 1, 2, 3], "param_names": list(_LEAVES)}
    return {"state": state, "param_groups": [group]}


def _params(run="plain", when="middle"):
    """The parameters as Flax would have them."""
    params = {"conv": {}, "dense": {}}
    for name, (path, axes) in _LEAVES.items():
        layer, leaf = path.split("/")
        value = _ARRAYS[f"{run}/{when}/{name}"]
        params[layer][leaf] = jnp.asarray(value if axes is None else np.transpose(value, axes))
    return params


def _loss(params):
    """That of the network of the fixture; kernels are (height, width, in, out)."""
    layout = ("NCHW", "HWIO", "NHWC")
    numbers = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": layout}
    conv = jax.lax.conv_general_dilated(_ARRAYS["x"], params["conv"]["kernel"], **numbers)
    h = jnp.tanh(conv + params["conv"]["bias"]).mean((1, 2))
    y = h @ params["dense"]["kernel"] + params["dense"]["bias"]
    return ((y - _ARRAYS["y"]) ** 2).mean()


_ADDED = optax.chain(optax.add_decayed_weights(0.1), adamaxw.adamax(0.01))


@pytest.mark.parametrize(
    ("run", "opt", "resumes", "ends_there"),
    [
        ("plain", adamaxw.adamax(0.01), True, True),
        ("plain", adamaxw.adamax(0.01), False, False),
        # PyTorch adds its decay to the gradient; ours, which is decoupled, ends elsewhere.
        ("decay", _ADDED, True, True),
        ("decay", adamaxw.adamaxw(0.01, weight_decay=0.1), True, False),
    ],
)
def test_training_goes_on(run, opt, resumes, ends_there):
    """From the middle of a run of PyTorch to its end, and not without its state or its decay."""
    params = _params(run)
    state = opt.init(params)
    if resumes:
        state = convert(from_torch(_state(run), params, _NAMES, _TRANSPOSES), state)

    @jax.jit
    def step(params, state):
        updates, state = opt.update(jax.grad(_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(_STEPS):
        params, state = step(params, state)
    # The gradients of the two float32 programs differ by a few in 1e7 of the largest.
    errors = jax.tree.map(lambda p, q: np.max(np.abs(p - q)), params, _params(run, "end"))
    assert (max(jax.tree.leaves(errors)) < 2e-6) == ends_there
    assert optax.tree.get(state, "count") == (2 if resumes else 1) * _STEPS


def _flat(keys):
    items = zip(keys, _state()["state"].values(), strict=True)
    return {f"state.{key}.{slot}": x for key, slots in items for slot, x in slots.items()}


def test_every_way_to_name_a_parameter():
    """By number or name, from a state_dict, a flat one of either, or safetensors as in the docs."""
    params = _params()
    expected = from_torch(_state(), params, _NAMES, _TRANSPOSES)
    assert (expected.count, expected.residual) == (_STEPS, None)
    assert types_of(expected.mu) == types_of(expected.nu) == types_of(params)
    for state, names, given in (
        (_state(), _OWN_NAMES, params),
        (_flat(range(4)), _NAMES, params),
        (_flat(_LEAVES), _OWN_NAMES, params),
        (_state(), {path: str(i) for path, i in _NAMES.items()}, params),
        (load_file(_FIXTURES / "torch_adamax.safetensors"), _OWN_NAMES, params),
        (_state(), _NAMES, jax.eval_shape(lambda: params)),
    ):
        assert_equal(from_torch(state, given, names, _TRANSPOSES), expected)


def _one(**changes):
    ones = np.ones((2, 3), np.float32)
    slots = {"step": np.float32(3), "exp_avg": ones, "exp_inf": ones}
    return {"state": {0: {**slots, **changes}}}


_ONE = {"w": np.ones((2, 3), np.float32)}


def test_steps_and_dtypes_of_every_version():
    """Steps are numbers or arrays of one; moments are as wide as the arithmetic of the leaf."""
    for step in (3, 3.0, np.int64(3), np.float32(3), np.array([3.0])):
        assert from_torch(_one(step=step), _ONE, {"w": 0}).count == 3
    assert from_torch(_one(step=1e12), _ONE, {"w": 0}).count == 2**31 - 1
    for dtype in (np.float16, np.float64, jnp.bfloat16):
        half = np.full((2, 3), 0.5, dtype)
        got = from_torch(_one(exp_avg=half, exp_inf=half), {"w": half}, {"w": 0})
        assert_equal((got.mu, got.nu), ({"w": half.astype(np.float32)},) * 2)
    with x64():
        third = np.full((2, 3), 1 / 3)
        assert_equal(from_torch(_one(exp_avg=third), {"w": third}, {"w": 0}).mu["w"], third)


def test_frozen_and_integer_leaves():
    """A parameter that never had a gradient has no state: None; integers need no name."""
    frozen = {"frozen": np.ones(4, np.float32), "complex": np.ones(4, np.complex64)}
    params = {**_ONE, **frozen, "ids": jnp.arange(2)}
    moments = from_torch(_one(), params, {"w": 0, "frozen": None, "complex": None})
    assert not any(x[name].any() for x in (moments.mu, moments.nu) for name in frozen)
    like = adamaxw.adamax(0.1).init(params)
    assert types_of(convert(moments, like)) == types_of(like)
    assert from_torch({"state": {}}, _ONE, {"w": None}).count == 0


def test_moments_lie_where_params_lie():
    """On their mesh, and on that of abstract params; in Flax NNX in place of Variables."""
    mesh = jax.make_mesh((2,), ("x",))
    placed = jax.device_put(_ONE["w"], NamedSharding(mesh, P("x", None)))
    for leaf in (placed, jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=placed.sharding)):
        got = from_torch(_one(), {"w": leaf}, {"w": 0})
        assert got.mu["w"].sharding == got.nu["w"].sharding == placed.sharding
    params = nnx.state(nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)))
    moments = from_torch(_one(), params, {"kernel": 0}, {"kernel": (1, 0)})
    like = adamaxw.adamax(0.1, moment_dtype="uint8").init(params)
    assert jax.tree.structure(convert(moments, like)) == jax.tree.structure(like)


_TWO = {**_ONE, "v": _ONE["w"]}


def _two(step):
    return {"state": _one()["state"] | {1: _one(step=step)["state"][0]}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": _TWO}, "names.*'v'"),
        ({"names": {"w": "x.y"}}, "names.*'x.y'"),
        ({"names": {"w": 0, "v": 1}}, "names.*'v'"),
        ({"names": {"w": 0, "v": 0}, "params": _TWO}, "names.*0"),
        ({"state": _two(3)}, "'1'.*state"),
        ({"state": _two(4), "params": _TWO, "names": {"w": 0, "v": 1}}, "steps.*4.*'v'.*3.*'w'"),
        ({"state": _one(exp_inf=np.ones(3))}, "'w'"),
        ({"state": _one(exp_avg=np.ones((2, 3), np.complex64))}, "'w'"),
        ({"params": {"w": np.ones((2, 3), np.complex64)}}, "'w'"),
        ({"state": {"state": {0: {"step": 1, "exp_avg_sq": 1.0}}}}, "state.*Adam"),
        ({"transposes": {"v": (0,)}}, "transposes.*'v'"),
        ({"transposes": {"w": (1, 0)}}, "'w'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    """Names, shapes, numbers of steps, and the state of Adam: by name or path."""
    arguments = {"state": _one(), "params": _ONE, "names": {"w": 0}, **changes}
    with pytest.raises((TypeError, ValueError), match=words):
        from_torch(**arguments)
