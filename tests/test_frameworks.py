"""In Flax, Equinox and Haiku: a framework adds nothing to a step and loses nothing."""

import functools
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import assert_equal, types_of
from flax import nnx
from gradients import gradients
from modes import apply_updates

import adamaxw
from adamaxw import masks

pytestmark = pytest.mark.usefixtures("compile_fast")

_ROWS, _IN, _OUT = 5, 4, 3
_standard = partial(jax.numpy_dtype_promotion, "standard")  # as in modes.apply_updates


class _NnxModel(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(_ROWS, _IN, param_dtype=dtype, rngs=rngs)
        self.dense = nnx.Linear(_IN, _OUT, param_dtype=dtype, rngs=rngs)


class _LinenModel(nn.Module):
    kernel_init: Any

    @nn.compact
    def __call__(self, index):
        return nn.Dense(_OUT, kernel_init=self.kernel_init)(nn.Embed(_ROWS, _IN)(index))


class _EqxModel(eqx.Module):
    embed: eqx.nn.Embedding
    dense: eqx.nn.Linear
    index: jax.Array
    activation: Any


@functools.cache
def _linen_params(dtype=jnp.float32, is_boxed=False):
    kernel_init = nn.initializers.lecun_normal()
    kernel_init = nn.with_partitioning(kernel_init, (None, "model")) if is_boxed else kernel_init
    init = jax.jit(_LinenModel(kernel_init).init)
    params = init(jax.random.key(0), jnp.zeros(2, jnp.int32))["params"]
    return optax.tree.cast(params, dtype)


@functools.cache
def _eqx_params(dtype=jnp.float32):
    embed = eqx.nn.Embedding(_ROWS, _IN, dtype=dtype, key=jax.random.key(0))
    dense = eqx.nn.Linear(_IN, _OUT, dtype=dtype, key=jax.random.key(1))
    model = _EqxModel(embed, dense, jnp.arange(2), jax.nn.relu)
    return eqx.filter(model, eqx.is_inexact_array)


@functools.cache
def _haiku_params(dtype=jnp.float32):
    init = hk.transform(lambda index: hk.nets.MLP([_OUT])(hk.Embed(_ROWS, _IN)(index))).init
    return optax.tree.cast(jax.jit(init)(jax.random.key(0), jnp.zeros(2, jnp.int32)), dtype)


# Functions from a dtype to params, and the path of the one kernel.
_FRAMEWORKS = {
    "nnx": (lambda dtype=jnp.float32: nnx.state(_NnxModel(dtype), nnx.Param), "dense/kernel"),
    "linen": (_linen_params, "Dense_0/kernel"),
    "linen with nn.Partitioned": (partial(_linen_params, is_boxed=True), "Dense_0/kernel"),
    "equinox": (_eqx_params, "dense/weight"),
    "haiku": (_haiku_params, "mlp/~/linear_0/w"),
}


def _functional(opt, params):
    @jax.jit
    def step(run, grads):
        updates, state = opt.update(grads, run[1], run[0])
        return apply_updates(run[0], updates), state

    return (params, opt.init(params)), step, lambda run: run


@nnx.jit(donate_argnums=(0, 1))
def _nnx_step(model, optimizer, grads):
    with _standard():
        optimizer.update(model, grads)


def _nnx_optimizer(opt, dtype):
    def step(run, grads):
        old = jax.tree.leaves((nnx.state(run[0], nnx.Param), nnx.state(run[1])))
        _nnx_step(*run, grads)
        assert all(x.is_deleted() for x in old)
        return run

    def parts(run):
        return jax.tree.map(jnp.copy, (nnx.state(run[0], nnx.Param), run[1].opt_state))

    model = _NnxModel(dtype)
    return (model, nnx.Optimizer(model, opt, wrt=nnx.Param)), step, parts


def _train(run, step, parts):
    """Params and state before and after three steps."""
    before = parts(run)
    leaves, treedef = jax.tree.flatten(before[0])
    drawn = [gradients("normal", 3, p.shape, seed) for seed, p in enumerate(leaves)]
    for i in range(3):
        rows = zip(drawn, leaves, strict=True)
        run = step(run, treedef.unflatten([jnp.asarray(g[i], p.dtype) for g, p in rows]))
    return before, parts(run)


_TREES = ("nnx.Optimizer", "linen with nn.Partitioned", "equinox", "haiku")
_HARDEST = (jnp.bfloat16, "uint8", "exact")  # with noise and a residual


@pytest.mark.parametrize(
    ("name", "dtype", "moment_dtype", "rounding"),
    [
        ("nnx.Optimizer", jnp.float32, None, "nearest"),
        *((name, *_HARDEST) for name in _TREES),
    ],
)
def test_trains_like_a_list_of_arrays(name, dtype, moment_dtype, rounding):
    """Bit for bit like the same arrays in a list, and in float32 like optax.adamaxw."""
    args = {"moment_dtype": moment_dtype, "param_rounding": rounding}
    hyper = {"learning_rate": 0.01, "weight_decay": 0.1}
    opt = adamaxw.adamaxw(**hyper, mask=masks.matrices, **args)
    is_nnx = name == "nnx.Optimizer"
    run = _nnx_optimizer(opt, dtype) if is_nnx else _functional(opt, _FRAMEWORKS[name][0](dtype))
    before, after = _train(*run)
    plain = jax.tree.leaves(before[0])
    hyper["mask"] = [p.ndim >= 2 for p in plain]
    _, expected = _train(*_functional(adamaxw.adamaxw(**hyper, **args), plain))
    for old, new, same in zip(before, after, expected, strict=True):
        assert jax.tree.structure(new) == jax.tree.structure(old)
        # Not as one tree: some versions of Flax NNX compare Variables by identity.
        assert jax.tree.leaves(types_of(new)) == jax.tree.leaves(types_of(old))
        assert_equal(jax.tree.leaves(new), jax.tree.leaves(same))
    assert all(np.any(p != q) for p, q in zip(expected[0], plain, strict=True))
    if moment_dtype is None:
        with _standard():
            _, (theirs, _) = _train(*_functional(optax.adamaxw(**hyper), plain))
        is_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(is_close, expected[0], theirs)


_halving = partial(adamaxw.adamaxw, 0.5, weight_decay=1.0)
_ones, _zeros = (partial(jax.tree.map, f) for f in (jnp.ones_like, jnp.zeros_like))


def _halved(params):
    """The paths of the parameters that a step without gradients took from 1 to half."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    assert all(np.all(p == 0.5) or np.all(p == 1) for _, p in leaves)
    paths = (path for path, p in leaves if np.all(p == 0.5))
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return {name.removesuffix("/value") for name in names}  # of a box or Variable


def _decayed(params, opt):
    params = _ones(params)
    updates, _ = opt.update(_zeros(params), opt.init(params), params)
    return _halved(optax.apply_updates(params, updates))


def _kernels(params):
    return jax.tree.map(lambda p: p.size == _IN * _OUT, params)


def _ranks(params):
    return jax.tree.map(lambda p: p.ndim, params)


_NOT_EMBEDDINGS = masks.matrices & ~masks.matching("(?i)embed")


@pytest.mark.parametrize("name", _FRAMEWORKS)
def test_what_decays(name):
    """Masks of every form choose the kernel in the tree of each framework, and nothing else."""
    make, path = _FRAMEWORKS[name]
    params = make()
    for mask in (_NOT_EMBEDDINGS, masks.matching(f"{path}$|{path}/"), _kernels, _kernels(params)):
        assert _decayed(params, _halving(mask=mask)) == {path}
    with pytest.raises(ValueError, match=f"'layers'.*{path}"):
        _halving(mask=masks.matching("layers")).init(params)
    parts = {2: _halving(mask=_NOT_EMBEDDINGS), 1: optax.sgd(1.0)}
    assert _decayed(params, optax.partition(parts, _ranks)) == {path}


@pytest.mark.usefixtures("standard_promotion")  # The wrappers of Optax promote.
@pytest.mark.parametrize(
    "opt",
    [
        _halving(mask=nnx.State({"dense": {"kernel": True, "bias": False}, "embed": False})),
        optax.partition({2: _halving(mask=_NOT_EMBEDDINGS), 1: optax.sgd(1.0)}, _ranks),
        optax.MultiSteps(_halving(mask=_NOT_EMBEDDINGS), 1),
    ],
)
def test_what_decays_in_nnx_optimizer(opt):
    """Forms and wrappers beside those of test_masks.py: Variables at init, arrays at update."""
    model = _NnxModel()
    params = nnx.state(model, nnx.Param)
    nnx.update(model, _ones(params))
    _nnx_step(model, nnx.Optimizer(model, opt, wrt=nnx.Param), _zeros(params))
    assert _halved(nnx.to_pure_dict(nnx.state(model, nnx.Param))) == {"dense/kernel"}


def test_boxes_of_linen():
    """The boxes of moments say how they are to be sharded, as those of parameters do."""
    params = _linen_params(is_boxed=True)
    state = adamaxw.adamaxw(0.1, moment_dtype="uint8").init(params)
    specs = nn.get_partition_spec(params)
    assert specs["Dense_0"]["kernel"] == jax.sharding.PartitionSpec(None, "model")
    assert nn.get_partition_spec(state.mu) == nn.get_partition_spec(state.nu) == specs


def test_exact_rounding_in_equinox():
    """eqx.apply_updates makes params float32, which update refuses; "stochastic" is right there."""
    params = _eqx_params(jnp.bfloat16)
    for rounding, dtype in (("stochastic", jnp.bfloat16), ("exact", jnp.float32)):
        opt = _halving(param_rounding=rounding)
        updates, state = opt.update(_ones(params), opt.init(params), params)
        assert types_of(apply_updates(params, updates)) == types_of(params)
        with _standard():
            applied = eqx.apply_updates(params, updates)
        assert applied.dense.weight.dtype == dtype
        if rounding == "exact":
            with pytest.raises(TypeError, match=r"params\.embed\.weight"):
                opt.update(_ones(params), state, applied)
