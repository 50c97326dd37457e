"""Going on from torch.optim.Adamax, beside what PyTorch itself did; it is not needed here.

`fixtures/make_torch_adamax.py` made the fixtures.
"""

import copy
import re
from pathlib import Path

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
from adamaxw.moments import convert, from_torch, pack

_FIXTURES = Path(__file__).parent / "fixtures"
_LEARNING_RATE, _WEIGHT_DECAY, _STEPS = 0.01, 0.1, 20

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


@pytest.fixture(scope="module")
def arrays():
    """All that PyTorch wrote down."""
    with np.load(_FIXTURES / "torch_adamax.npz") as file:
        return dict(file)


def _state(arrays, run="plain"):
    """A state_dict with arrays in place of tensors."""
    state = {
        i: {
            slot: arrays[f"{run}/state/{i}/{slot}"].copy()
            for slot in ("step", "exp_avg", "exp_inf")
        }
        for i in range(4)
    }
    group = {"lr": 0.01, "params": [0, 1, 2, 3], "param_names": list(_LEAVES)}
    return {"state": state, "param_groups": [group]}


def _params(arrays, run="plain", when="middle"):
    """The parameters as Flax would have them."""
    params = {"conv": {}, "dense": {}}
    for name, (path, axes) in _LEAVES.items():
        layer, leaf = path.split("/")
        value = arrays[f"{run}/{when}/{name}"]
        params[layer][leaf] = jnp.asarray(value if axes is None else np.transpose(value, axes))
    return params


def _loss(params, x, y):
    """The network of the fixture; kernels are (height, width, in, out)."""
    conv = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NHWC")
    )
    h = jnp.tanh(conv + params["conv"]["bias"]).mean((1, 2))
    return ((h @ params["dense"]["kernel"] + params["dense"]["bias"] - y) ** 2).mean()


def _train(opt, params, state, arrays):
    @jax.jit
    def step(params, state):
        grads = jax.grad(_loss)(params, arrays["x"], arrays["y"])
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(_STEPS):
        params, state = step(params, state)
    return params, state


def _assert_ends_there(params, arrays, run):
    """Where PyTorch ended.

    Two float32 programs of 20 steps of 0.01 that divide by small norms; gradients differ by a few
    in 1e7 of the largest, and so do the steps of elements in which it cancels.
    """
    for got, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(_params(arrays, run, "end")), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6)


def test_training_goes_on(arrays):
    """From the middle of a run of PyTorch to its end, gradients computed by JAX."""
    params = _params(arrays)
    state = pack(from_torch(_state(arrays), params, _NAMES, _TRANSPOSES))
    opt = adamaxw.adamax(_LEARNING_RATE)
    assert types_of(state) == types_of(opt.init(params))
    params, state = _train(opt, params, state, arrays)
    _assert_ends_there(params, arrays, "plain")
    assert state.count == 2 * _STEPS


def test_it_would_not_without_the_state(arrays):
    """The same from init, or with the moments of another leaf, ends elsewhere."""
    params = _params(arrays)
    opt = adamaxw.adamax(_LEARNING_RATE)
    params, _ = _train(opt, params, opt.init(params), arrays)
    with pytest.raises(AssertionError):
        _assert_ends_there(params, arrays, "plain")


def test_weight_decay_of_pytorch_goes_on(arrays):
    """It is added to the gradient: optax.add_decayed_weights before adamax."""
    params = _params(arrays, "decay")
    opt = optax.chain(
        optax.add_decayed_weights(_WEIGHT_DECAY), adamaxw.adamax(_LEARNING_RATE, eps=1e-8)
    )
    moments = from_torch(_state(arrays, "decay"), params, _NAMES, _TRANSPOSES)
    params, _ = _train(opt, params, convert(moments, opt.init(params)), arrays)
    _assert_ends_there(params, arrays, "decay")


def test_decoupled_decay_is_another(arrays):
    """Ours with the same weight decay ends elsewhere."""
    params = _params(arrays, "decay")
    opt = adamaxw.adamaxw(_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    moments = from_torch(_state(arrays, "decay"), params, _NAMES, _TRANSPOSES)
    params, _ = _train(opt, params, convert(moments, opt.init(params)), arrays)
    with pytest.raises(AssertionError):
        _assert_ends_there(params, arrays, "decay")


@pytest.mark.parametrize("name", [None, "bfloat16", "uint8"])
def test_in_any_format(arrays, name):
    """What convert makes of them, alone or in a chain, is what pack makes."""
    params = _params(arrays)
    moments = from_torch(_state(arrays), params, _NAMES, _TRANSPOSES)
    opt = adamaxw.adamaxw(0.1, moment_dtype=name)
    assert_equal(convert(moments, opt.init(params)), pack(moments, name))
    chain = optax.chain(optax.clip(1.0), opt)
    assert_equal(convert(moments, chain.init(params))[1], pack(moments, name))


def _flat(arrays, keys):
    return {
        f"state.{key}.{slot}": value
        for key, slots in zip(keys, _state(arrays)["state"].values(), strict=True)
        for slot, value in slots.items()
    }


def test_every_way_to_name_a_parameter(arrays):
    """By number or name, from a state_dict or a flat one of either."""
    params = _params(arrays)
    expected = from_torch(_state(arrays), params, _NAMES, _TRANSPOSES)
    for state, names in (
        (_state(arrays), _OWN_NAMES),
        (_flat(arrays, range(4)), _NAMES),
        (_flat(arrays, _LEAVES), _OWN_NAMES),
        (_state(arrays), {path: str(i) for path, i in _NAMES.items()}),
    ):
        assert_equal(from_torch(state, params, names, _TRANSPOSES), expected)


def test_from_safetensors(arrays):
    """The file that docs/conversions.md says how to write."""
    params = _params(arrays)
    state = load_file(_FIXTURES / "torch_adamax.safetensors")
    got = from_torch(state, params, _OWN_NAMES, _TRANSPOSES)
    assert_equal(got, from_torch(_state(arrays), params, _NAMES, _TRANSPOSES))


def test_what_comes_back(arrays):
    """float32 moments in the shapes of params, and the count; abstract params are enough."""
    params = _params(arrays)
    moments = from_torch(_state(arrays), params, _NAMES, _TRANSPOSES)
    assert moments.count == _STEPS
    assert moments.residual is None
    for tree in (moments.mu, moments.nu):
        assert types_of(tree) == types_of(params)
    shapes = jax.eval_shape(lambda: params)
    assert_equal(from_torch(_state(arrays), shapes, _NAMES, _TRANSPOSES), moments)


def _one(**changes):
    slots = {
        "step": np.float32(3),
        "exp_avg": np.ones((2, 3), np.float32),
        "exp_inf": np.ones((2, 3), np.float32),
    }
    return {"state": {0: {**slots, **changes}}}


_ONE = {"w": np.ones((2, 3), np.float32)}


@pytest.mark.parametrize("step", [3, 3.0, np.int64(3), np.float32(3), np.array([3.0])])
def test_steps_of_every_version(step):
    """A number, or an array of one; it ends where int32 does."""
    assert from_torch(_one(step=step), _ONE, {"w": 0}).count == 3
    assert from_torch(_one(step=1e12), _ONE, {"w": 0}).count == 2**31 - 1


def test_dtypes():
    """Moments are as wide as the arithmetic of the leaf, whatever PyTorch had."""
    for dtype in (np.float16, np.float32, np.float64, jnp.bfloat16):
        half = np.full((2, 3), 0.5, dtype)
        for param in (np.float32, jnp.bfloat16):
            got = from_torch(
                _one(exp_avg=half, exp_inf=half), {"w": np.ones((2, 3), param)}, {"w": 0}
            )
            assert got.mu["w"].dtype == got.nu["w"].dtype == jnp.float32
            assert (got.mu["w"] == 0.5).all()
    with x64():
        third = np.full((2, 3), 1 / 3)
        got = from_torch(_one(exp_avg=third), {"w": np.ones((2, 3))}, {"w": 0})
        assert_equal(got.mu["w"], third)


def test_frozen_and_integer_leaves():
    """A parameter that never had a gradient has no state: None; integers need no name."""
    frozen = {"frozen": np.ones(4, np.float32), "complex": np.ones(4, np.complex64)}
    params = {**_ONE, **frozen, "ids": jnp.arange(2)}
    moments = from_torch(_one(), params, {"w": 0, "frozen": None, "complex": None})
    assert not moments.mu["frozen"].any()
    assert not moments.nu["frozen"].any()
    state = convert(moments, adamaxw.adamax(0.1).init(params))
    assert types_of(state) == types_of(adamaxw.adamax(0.1).init(params))


def test_nothing_frozen_has_done_no_steps():
    """With no parameter named at all, the count is 0."""
    assert from_torch({"state": {}}, _ONE, {"w": None}).count == 0


def test_nan_stays_visible():
    """It is in the moments, and in the update."""
    state = _one()
    state["state"][0]["exp_avg"][0, 0] = np.nan
    moments = from_torch(state, _ONE, {"w": 0})
    opt = adamaxw.adamax(0.1, moment_dtype="uint8")
    updates, _ = opt.update(_ONE, convert(moments, opt.init(_ONE)))
    assert np.isnan(updates["w"]).sum() == 1


def test_moments_lie_where_params_lie():
    """On their mesh, and on that of abstract params."""
    mesh = jax.make_mesh((2,), ("x",))
    placed = jax.device_put(_ONE["w"], NamedSharding(mesh, P("x", None)))
    for leaf in (placed, jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=placed.sharding)):
        got = from_torch(_one(), {"w": leaf}, {"w": 0})
        assert got.mu["w"].sharding == got.nu["w"].sharding == placed.sharding


def test_in_flax_nnx():
    """Paths are those without the Variables, and moments go into the state of an Optimizer."""
    model = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamaxw.adamax(0.1, moment_dtype="uint8"), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    moments = from_torch(_one(), params, {"kernel": 0}, {"kernel": (1, 0)})
    state = convert(moments, optimizer.opt_state)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.opt_state)
    assert types_of(jax.tree.leaves(state)) == types_of(jax.tree.leaves(optimizer.opt_state))


class _Tensor:
    """What stands for a tensor of PyTorch: an array of another library."""

    __module__ = "torch"
    dtype, shape = "torch.float32", (2, 3)


_TWICE = {**_ONE, "v": _ONE["w"]}
_TWO = {**_ONE, "b": np.ones(2, np.float32)}


def _two(step):
    small = np.ones(2, np.float32)
    state = _one()
    state["state"][1] = {"step": step, "exp_avg": small, "exp_inf": small}
    return state


@pytest.mark.parametrize(
    ("state", "params", "names", "transposes", "error", "match"),
    [
        (_one(), _TWO, {"w": 0}, {}, ValueError, r"names must say which parameter is 'b', or None"),
        (
            _one(),
            _ONE,
            {"w": 5},
            {},
            ValueError,
            r"names has 5 for 'w', which state does not .* '0'",
        ),
        (_one(), _ONE, {"w": "x.y"}, {}, ValueError, r"names has 'x.y' for 'w', which state does"),
        (_one(), _ONE, {"w": 0, "v": 1}, {}, ValueError, r"names has no leaf .*for \['v'\].* 'w'"),
        (_one(), _ONE, {"w": 0}, {"v": (0,)}, ValueError, r"transposes has no leaf .*for \['v'\]"),
        (_two(3), _ONE, {"w": 0}, {}, ValueError, r"no leaf of params for \['1'\] of state"),
        (_one(), _TWICE, {"w": 0, "v": 0}, {}, ValueError, r"names has 0 for both 'v' and 'w'"),
        (_two(4), _TWO, {"w": 0, "b": 1}, {}, ValueError, r"steps, got 4 for 'b', 3 for 'w'"),
        (
            _one(),
            _ONE,
            {"w": 0},
            {"w": (1, 0)},
            ValueError,
            r"0 has shape \(3, 2\) after the transpose \(1, 0\), params 'w' has \(2, 3\)",
        ),
        (
            _one(exp_inf=np.ones(3, np.float32)),
            _ONE,
            {"w": 0},
            {},
            ValueError,
            r"0 has shape \(3,\), params 'w' has \(2, 3\)",
        ),
        (_one(), _ONE, {"w": 0}, {"w": (0, 0)}, ValueError, r"transposes has \(0, 0\) for 'w'"),
        (_one(), _ONE, {"w": 0}, {"w": (0,)}, ValueError, r"for 'w', but 0 has shape \(2, 3\)"),
        (
            {"state": {0: {"step": 1, "exp_avg": 1.0, "exp_avg_sq": 1.0}}},
            _ONE,
            {"w": 0},
            {},
            ValueError,
            r"state of 0 has exp_avg_sq, as Adam keeps it.*init, and warm",
        ),
        (
            {"state": {0: {"step": 1, "momentum_buffer": 1.0}}},
            _ONE,
            {"w": 0},
            {},
            ValueError,
            r"state of 0 has no exp_avg and no exp_inf, but it has 'step', 'momentum_buffer'",
        ),
        (
            _one(exp_avg=_Tensor()),
            _ONE,
            {"w": 0},
            {},
            TypeError,
            r"exp_avg in state of 0 must be a NumPy array, got torch\._Tensor: .*float\(\)\.numpy",
        ),
        (_one(step=_Tensor()), _ONE, {"w": 0}, {}, TypeError, r"step in state of 0 must be a Num"),
        (
            _one(exp_avg=np.ones((2, 3), np.int32)),
            _ONE,
            {"w": 0},
            {},
            TypeError,
            r"exp_avg in state of 0 must be real floating numbers, got int32",
        ),
        (
            _one(exp_inf=np.ones((2, 3), np.complex64)),
            _ONE,
            {"w": 0},
            {},
            TypeError,
            r"exp_inf .* got complex64; of complex parameters PyTorch keeps a norm for each part",
        ),
        (
            _one(),
            {"w": np.ones((2, 3), np.complex64)},
            {"w": 0},
            {},
            TypeError,
            r"params 'w' is complex64, its moments in state are real",
        ),
        (_one(step=2.5), _ONE, {"w": 0}, {}, ValueError, r"step in state of 0 must be a whole"),
        (_one(step=-1), _ONE, {"w": 0}, {}, ValueError, r"must be a whole number, got -1"),
        (_one(step=np.nan), _ONE, {"w": 0}, {}, ValueError, r"must be a whole number"),
        (_one(step=np.ones(2)), _ONE, {"w": 0}, {}, ValueError, r"must be a whole number"),
        (_one()["state"], _ONE, {"w": 0}, {}, ValueError, r"state has the key 0, where"),
        (_one(), {"w": "abc"}, {"w": 0}, {}, TypeError, r"params 'w' must be a NumPy array.*str"),
        ({"conv.weight": 1.0}, _ONE, {"w": 0}, {}, ValueError, r"the key 'conv.weight', where"),
        ({"state.exp_avg": 1.0}, _ONE, {"w": 0}, {}, ValueError, r"the key 'state.exp_avg', wh"),
    ],
)
def test_what_does_not_fit_is_refused(state, params, names, transposes, error, match):
    """With what is there and what was expected."""
    state = copy.deepcopy(state)
    with pytest.raises(error, match=match):
        from_torch(state, params, names, transposes)


def test_the_lines_of_the_page_that_write_the_state(tmp_path, monkeypatch):
    """They go by the order of the optimizer, which need not be that of the model."""
    torch = pytest.importorskip("torch", reason="PyTorch is optional: it writes, we read")
    page = (Path(__file__).parents[1] / "docs" / "conversions.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```text\n(import torch\n.*?)```", page, re.S)
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(2, 2), "last": torch.nn.Linear(2, 2)})
    groups = [{"params": model[name].parameters()} for name in ("last", "first")]
    optimizer = torch.optim.Adamax(groups)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    monkeypatch.chdir(tmp_path)
    exec(lines, {"model": model, "optimizer": optimizer})

    names = [name for name, _ in model.named_parameters()]
    params = {name: p.detach().numpy() for name, p in model.named_parameters()}
    state = load_file("adamax.safetensors")
    moments = from_torch(state, params, {name: name for name in names})
    assert [float(moments.nu[name].ravel()[0]) for name in names] == [1, 2, 3, 4]
    assert moments.count == 1
