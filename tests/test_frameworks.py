"""In Flax, Equinox, Haiku and plain JAX: a framework adds nothing to a step and loses nothing."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

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
from flax.training import train_state
from gradients import gradients
from modes import apply_updates

import adamaxw
from adamaxw import masks

pytestmark = pytest.mark.usefixtures("compile_fast")

_ROWS, _IN, _OUT = 5, 4, 3


class _Run(NamedTuple):
    """A run of three steps.

    Attributes:
        start: the leaves of params before it, as NumPy arrays.
        types: those of the state before it.
        params: params after it.
        state: the state after it.
    """

    start: list[Any]
    types: Any
    params: Any
    state: Any


def _gradients(params):
    """Three gradients in the structure and dtypes of params."""
    leaves, treedef = jax.tree.flatten(params)
    drawn = [gradients("normal", 3, p.shape, seed) for seed, p in enumerate(leaves)]
    return [
        treedef.unflatten([jnp.asarray(g[i], p.dtype) for g, p in zip(drawn, leaves, strict=True)])
        for i in range(3)
    ]


def _copy(params):
    return [np.array(p) for p in jax.tree.leaves(params)]


def _types(state):
    # Not as one tree: some versions of Flax NNX compare Variables by identity.
    return jax.tree.structure(state), jax.tree.leaves(types_of(state))


def _functional(opt, params):
    """A run of a framework whose params are a tree: a compiled function of params and state."""
    start, state, steps = _copy(params), opt.init(params), _gradients(params)
    types = _types(state)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    for grads in steps:
        params, state = step(params, state, grads)
    return _Run(start, types, params, state)


class _NnxModel(nnx.Module):
    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(_ROWS, _IN, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(_IN, param_dtype=dtype, rngs=rngs)
        self.dense = nnx.Linear(_IN, _OUT, param_dtype=dtype, rngs=rngs)

    def __call__(self, index):
        return self.dense(self.norm(self.embed(index)))


@nnx.jit(donate_argnums=(0, 1))
def _nnx_step(model, optimizer, grads):
    with jax.numpy_dtype_promotion("standard"):  # as in modes.apply_updates
        optimizer.update(model, grads)


def _nnx_optimizer(opt, dtype):
    model = _NnxModel(dtype)
    params = nnx.state(model, nnx.Param)
    start, steps = _copy(params), _gradients(params)
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    types = _types(optimizer.opt_state)
    for grads in steps:
        _nnx_step(model, optimizer, grads)
    return _Run(start, types, nnx.state(model, nnx.Param), optimizer.opt_state)


def _nnx_functional(opt, dtype):
    return _functional(opt, nnx.split(_NnxModel(dtype), nnx.Param, ...)[1])


class _LinenModel(nn.Module):
    dtype: Any = jnp.float32
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, index):
        x = nn.Embed(_ROWS, _IN, param_dtype=self.dtype)(index)
        x = nn.BatchNorm(use_running_average=False, param_dtype=self.dtype)(x)
        return nn.Dense(_OUT, kernel_init=self.kernel_init, param_dtype=self.dtype)(x)


def _linen_params(*args):
    # Its norms promote what they are given to float32.
    with jax.numpy_dtype_promotion("standard"):
        init = jax.jit(_LinenModel(*args).init)
        return init(jax.random.key(0), jnp.zeros(2, jnp.int32))["params"]


def _linen_train_state(opt, dtype):
    params = _linen_params(dtype)
    start, steps = _copy(params), _gradients(params)
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=opt)
    types = _types(state.opt_state)

    @partial(jax.jit, donate_argnums=0)
    def step(state, grads):
        with jax.numpy_dtype_promotion("standard"):  # as in modes.apply_updates
            return state.apply_gradients(grads=grads)

    for grads in steps:
        state = step(state, grads)
    return _Run(start, types, state.params, state.opt_state)


def _linen_boxes_params(dtype=jnp.float32):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    return _linen_params(dtype, init)


def _linen_boxes(opt, dtype):
    return _functional(opt, _linen_boxes_params(dtype))


class _EqxModel(eqx.Module):
    embed: eqx.nn.Embedding
    dense: eqx.nn.Linear
    index: jax.Array
    activation: Any
    name: str = eqx.field(static=True)

    def __init__(self, dtype=jnp.float32):
        keys = jax.random.split(jax.random.key(0))
        self.embed = eqx.nn.Embedding(_ROWS, _IN, dtype=dtype, key=keys[0])
        self.dense = eqx.nn.Linear(_IN, _OUT, dtype=dtype, key=keys[1])
        self.index = jnp.arange(2)
        self.activation = jax.nn.relu
        self.name = "model"


def _equinox(opt, dtype):
    """The idiom of its documentation; the index and the activation get None as gradients."""
    model = _EqxModel(dtype)
    params = _equinox_params(dtype)
    start, steps, state = _copy(params), _gradients(params), opt.init(params)
    types = _types(state)

    @eqx.filter_jit(donate="all-except-first")
    def step(grads, model, state):
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = opt.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    for grads in steps:
        model, state = step(grads, model, state)
    assert (model.activation, model.name) == (jax.nn.relu, "model")
    np.testing.assert_array_equal(model.index, [0, 1])
    return _Run(start, types, eqx.filter(model, eqx.is_inexact_array), state)


def _equinox_params(dtype=jnp.float32):
    return eqx.filter(_EqxModel(dtype), eqx.is_inexact_array)


def _without_bias(model):
    return eqx.tree_at(lambda model: model.dense.bias, model, None)


def _equinox_by_optax(opt, dtype):
    return _functional(opt, _equinox_params(dtype))


def _haiku_params(dtype=jnp.float32):
    def forward(index):
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Embed(_ROWS, _IN)(index))
        return hk.nets.MLP([_OUT])(x)

    params = jax.jit(hk.transform(forward).init)(jax.random.key(0), jnp.zeros(2, jnp.int32))
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _haiku(opt, dtype):
    return _functional(opt, _haiku_params(dtype))


@partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["name"])
@dataclasses.dataclass
class _Dense:
    w: Any
    b: Any
    name: str


class _Params(NamedTuple):
    dense: _Dense
    scale: Any
    rest: Any = None


def _own_params(dtype=jnp.float32):
    w = jnp.linspace(-1, 1, _IN * _OUT).reshape(_IN, _OUT)
    params = _Params(_Dense(w, jnp.zeros(_OUT), "dense"), jnp.ones(_IN))
    return jax.tree.map(lambda p: p.astype(dtype), params)


def _own_mask(w=True, b=False, name="dense"):
    return _Params(_Dense(w, b, name), True)


def _own_classes(opt, dtype):
    return _functional(opt, _own_params(dtype))


_FRAMEWORKS = {
    "nnx.Optimizer": _nnx_optimizer,
    "nnx.split": _nnx_functional,
    "linen TrainState": _linen_train_state,
    "linen with nn.Partitioned": _linen_boxes,
    "equinox": _equinox,
    "equinox, optax.apply_updates": _equinox_by_optax,
    "haiku": _haiku,
    "dataclass and NamedTuple": _own_classes,
}


# With a residual, and with noise that differs from leaf to leaf.
_HARDEST = ("bfloat16", "uint8", "exact")
_FORMATS = {
    "nnx.Optimizer": [("bfloat16", "bfloat16", "stochastic"), _HARDEST],
    "linen TrainState": [("bfloat16", "bfloat16", "stochastic"), _HARDEST],
    # Not "exact": see test_exact_rounding_in_equinox.
    "equinox": [("float32", "uint8", "nearest"), ("bfloat16", "bfloat16", "stochastic")],
}


@pytest.mark.parametrize(
    ("framework", "dtype", "moment_dtype", "param_rounding"),
    [
        (framework, *formats)
        for framework in _FRAMEWORKS
        for formats in [("float32", None, "nearest"), *_FORMATS.get(framework, [_HARDEST])]
    ],
)
def test_trains_like_a_list_of_arrays(framework, dtype, moment_dtype, param_rounding):
    """Parameters and state are, bit for bit, those of the same arrays in a list; types stay."""
    make = partial(
        adamaxw.adamaxw,
        0.01,
        weight_decay=0.1,
        moment_dtype=moment_dtype,
        param_rounding=param_rounding,
    )
    run = _FRAMEWORKS[framework](make(mask=masks.matrices), dtype)
    plain = [jnp.asarray(p) for p in run.start]
    expected = _functional(make(mask=[p.ndim >= 2 for p in plain]), plain)
    assert _types(run.state) == run.types
    assert_equal(jax.tree.leaves(run.params), expected.params)
    assert_equal(jax.tree.leaves(run.state), jax.tree.leaves(expected.state))
    assert all(np.any(p != q) for p, q in zip(_copy(run.params), run.start, strict=True))


_halving = partial(adamaxw.adamaxw, 0.5, weight_decay=1.0)


def _halved(updates, params):
    """The paths of the parameters that a step without gradients takes to half; others stay."""
    paths = set()
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    for (path, u), p in zip(leaves, jax.tree.leaves(params), strict=True):
        if np.any(u != 0):
            np.testing.assert_array_equal(u, -0.5 * p)
            paths.add(jax.tree_util.keystr(path, simple=True, separator="/"))
    return paths


def _decayed(params, opt):
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(opt.update)(zeros, opt.init(params), params)
    return _halved(updates, params)


def _ones(params):
    return jax.tree.map(jnp.ones_like, params)


def _ranks(params):
    return jax.tree.map(lambda p: p.ndim, params)


def _ndim_tree(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


_LINEN_PREFIX = {"Dense_0": True, "BatchNorm_0": False, "Embed_0": False}
_NOT_EMBEDDINGS = masks.matrices & ~masks.matching("(?i)embed")


@pytest.mark.parametrize(
    ("params", "mask", "expected"),
    [
        (_linen_params, masks.matrices, {"Dense_0/kernel", "Embed_0/embedding"}),
        (_linen_params, _NOT_EMBEDDINGS, {"Dense_0/kernel"}),
        (_linen_params, masks.matching("scale$"), {"BatchNorm_0/scale"}),
        (_linen_params, _LINEN_PREFIX, {"Dense_0/kernel", "Dense_0/bias"}),
        (_linen_boxes_params, masks.matrices, {"Dense_0/kernel/value", "Embed_0/embedding"}),
        (_linen_boxes_params, _NOT_EMBEDDINGS, {"Dense_0/kernel/value"}),
        (_linen_boxes_params, _ndim_tree, {"Dense_0/kernel/value", "Embed_0/embedding"}),
        (_equinox_params, masks.matrices, {"dense/weight", "embed/weight"}),
        (_equinox_params, _NOT_EMBEDDINGS, {"dense/weight"}),
        (_haiku_params, masks.matrices, {"mlp/~/linear_0/w", "embed/embeddings"}),
        (_haiku_params, masks.matching("/w$"), {"mlp/~/linear_0/w"}),
        (
            _haiku_params,
            lambda params: hk.data_structures.map(lambda module, name, p: name == "w", params),
            {"mlp/~/linear_0/w"},
        ),
        (_own_params, masks.matching("dense/w"), {"dense/w"}),
        (_own_params, _own_mask(), {"dense/w", "scale"}),
        (_own_params, _Params(dense=True, scale=False), {"dense/w", "dense/b"}),
    ],
)
def test_what_decays(params, mask, expected):
    """In the trees of each framework the mask chooses what it says, and nothing else changes."""
    assert _decayed(_ones(params()), _halving(mask=mask)) == expected


_PARAMS = {
    "nnx.State": lambda: nnx.state(_NnxModel(), nnx.Param),
    "linen": _linen_params,
    "linen with nn.Partitioned": _linen_boxes_params,
    "equinox": _equinox_params,
    "haiku": _haiku_params,
    "dataclass and NamedTuple": _own_params,
}


@pytest.mark.parametrize("framework", _PARAMS)
def test_a_tree_of_booleans_and_optax_partition(framework):
    """What jax.tree.map makes of params is a mask; masks work inside partition."""
    params = _ones(_PARAMS[framework]())
    expected = _decayed(params, _halving(mask=masks.matrices))
    assert expected
    assert _decayed(params, _halving(mask=_ndim_tree(params))) == expected

    parts = {2: _halving(mask=masks.matrices), 1: optax.sgd(1.0)}
    assert _decayed(params, optax.partition(parts, _ranks)) == expected


def _decayed_in_nnx(model, opt, wrt=nnx.Param):
    params = nnx.state(model, wrt)
    nnx.update(model, _ones(params))
    optimizer = nnx.Optimizer(model, opt, wrt=wrt)
    _nnx_step(model, optimizer, jax.tree.map(jnp.zeros_like, params))
    halves = nnx.to_pure_dict(nnx.state(model, wrt))
    ones = _ones(halves)
    return _halved(jax.tree.map(jnp.subtract, halves, ones), ones)


_PREFIX = {"dense": {"kernel": True, "bias": False}, "embed": False, "norm": False}


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda params: masks.matrices, {"dense/kernel", "embed/embedding"}),
        (lambda params: _NOT_EMBEDDINGS, {"dense/kernel"}),
        (lambda params: masks.matching("^norm/"), {"norm/scale", "norm/bias"}),
        (lambda params: _ndim_tree, {"dense/kernel", "embed/embedding"}),
        (lambda params: _ndim_tree(params), {"dense/kernel", "embed/embedding"}),
        (
            lambda params: nnx.State(_ndim_tree(nnx.to_pure_dict(params))),
            {"dense/kernel", "embed/embedding"},
        ),
        (lambda params: nnx.State(_PREFIX), {"dense/kernel"}),
    ],
)
def test_what_decays_in_nnx_optimizer(mask, expected):
    """It gives Variables to init and arrays to update; masks with and without them fit both."""
    model = _NnxModel()
    opt = _halving(mask=mask(nnx.state(model, nnx.Param)))
    assert _decayed_in_nnx(model, opt) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda mask: optax.chain(optax.clip_by_global_norm(1.0), _halving(mask=mask)),
        lambda mask: optax.masked(_halving(), mask),
        lambda mask: optax.inject_hyperparams(adamaxw.adamaxw)(0.5, weight_decay=1.0, mask=mask),
        lambda mask: optax.partition({2: _halving(mask=mask), 1: optax.sgd(1.0)}, _ranks),
        lambda mask: optax.masked(_halving(mask=mask), masks.matrices),
        lambda mask: optax.apply_if_finite(_halving(mask=mask), 2),
        lambda mask: optax.MultiSteps(_halving(mask=mask), 1),
    ],
)
def test_wrappers_in_nnx_optimizer(wrap):
    """Wrappers of Optax take the masks of this package there, too."""
    # Wrappers of Optax promote.
    with jax.numpy_dtype_promotion("standard"):
        assert _decayed_in_nnx(_NnxModel(), wrap(_NOT_EMBEDDINGS)) == {"dense/kernel"}


def test_trees_that_optax_reads_in_nnx_optimizer():
    """A tree of Variables fits init alone there: as labels, and as the mask of optax.adamaxw."""
    model = _NnxModel()
    params = nnx.state(model, nnx.Param)
    labels = jax.tree.map(lambda p: "all", params)
    for opt in (
        optax.partition({"all": _halving()}, labels),
        optax.adamaxw(0.1, mask=_ndim_tree(params)),
    ):
        optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
        with (
            jax.numpy_dtype_promotion("standard"),
            pytest.raises(ValueError, match=r"variablelib\.Param"),
        ):
            optimizer.update(model, _ones(params))


class _Adapted(nnx.Module):
    """A frozen layer with a low-rank change of it that trains."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(_IN, _OUT, rngs=rngs)
        self.lora = nnx.LoRA(_IN, 2, _OUT, rngs=rngs)

    def __call__(self, x):
        return self.dense(x) + self.lora(x)


def test_a_subset_of_the_parameters_in_nnx():
    """With wrt the state holds what trains, paths start there, and the rest stays bit for bit."""
    model = _Adapted()
    frozen = _copy(nnx.state(model.dense))
    opt = adamaxw.adamaxw(0.1, mask=masks.matching("lora_a$"))
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.LoRAParam)
    assert len(jax.tree.leaves(optimizer.opt_state.mu)) == 2
    x = jnp.ones((2, _IN))
    of_lora = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda model: jnp.sum(model(x)), argnums=of_lora)(model)
    before = _copy(nnx.state(model.lora))
    _nnx_step(model, optimizer, grads)
    assert_equal(_copy(nnx.state(model.dense)), frozen)
    changed = zip(_copy(nnx.state(model.lora)), before, strict=True)
    assert any(np.any(p != q) for p, q in changed)

    opt = _halving(mask=masks.matching("lora_a$"))
    assert _decayed_in_nnx(_Adapted(), opt, nnx.LoRAParam) == {"lora/lora_a"}
    with pytest.raises(ValueError, match=r"'kernel' matches no path .* lora/lora_a, lora/lora_b"):
        nnx.Optimizer(model, _halving(mask=masks.matching("kernel")), wrt=nnx.LoRAParam)


class _Tied(nnx.Module):
    """An embedding that is also the last layer."""

    def __init__(self):
        self.embed = nnx.Embed(_ROWS, _IN, rngs=nnx.Rngs(0))
        self.head = self.embed

    def __call__(self, index):
        return self.head.attend(self.embed(index))


def test_tied_parameters_in_nnx():
    """They are one leaf, with one moment and the sum of the gradients."""
    model = _Tied()
    start = jnp.array(model.embed.embedding[...])
    opt = adamaxw.adamaxw(0.1, weight_decay=0.1, mask=masks.matching("embedding"))
    optimizer = nnx.Optimizer(model, opt, wrt=nnx.Param)
    index = jnp.arange(2)
    grads = nnx.grad(lambda model: jnp.sum(model(index) ** 2))(model)
    _nnx_step(model, optimizer, grads)
    assert model.head is model.embed

    def loss(embedding):
        return jnp.sum((embedding[index] @ embedding.T) ** 2)

    opt = adamaxw.adamaxw(0.1, weight_decay=0.1)
    updates, _ = opt.update(jax.grad(loss)(start), opt.init(start), start)
    # The two parts of the gradient are summed in another order.
    np.testing.assert_allclose(model.embed.embedding[...], start + updates, rtol=1e-6)


class _Deep(nnx.Module):
    """Layers that are stacked along their first dimension."""

    def __init__(self):
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(_IN, _IN, rngs=rngs)))
        self.layers = make(nnx.Rngs(0))
        self.head = nnx.Linear(_IN, _OUT, rngs=nnx.Rngs(1))

    def __call__(self, x):
        scan = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(scan(x, self.layers))


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (masks.matching("kernel"), {"layers/kernel", "head/kernel"}),
        (masks.matrices, {"layers/kernel", "layers/bias", "head/kernel"}),
        (masks.rank(3) | masks.matching("^head/kernel"), {"layers/kernel", "head/kernel"}),
    ],
)
def test_stacked_layers_in_nnx(mask, expected):
    """Biases of stacked layers have rank 2: they decay by rank, and do not by name."""
    assert _decayed_in_nnx(_Deep(), _halving(mask=mask)) == expected


def test_donation_in_nnx():
    """nnx.jit updates parameters and state where they are; what they replace is gone."""
    model = _NnxModel()
    optimizer = nnx.Optimizer(model, _halving(), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    grads = _ones(params)
    old = jax.tree.leaves((params, nnx.state(optimizer)))
    _nnx_step(model, optimizer, grads)
    assert all(x.is_deleted() for x in old)
    assert optimizer.opt_state.count[...] == 1


def test_boxes_of_linen():
    """The boxes of moments say how they are to be sharded, as those of parameters do."""
    params = _linen_boxes_params()
    state = adamaxw.adamaxw(0.1, moment_dtype="uint8").init(params)
    specs = nn.get_partition_spec(params)
    assert specs["Dense_0"]["kernel"] == jax.sharding.PartitionSpec(None, "model")
    assert nn.get_partition_spec(state.mu) == nn.get_partition_spec(state.nu) == specs


def test_exact_rounding_in_equinox():
    """eqx.apply_updates turns bfloat16 into float32, and the next step says what to use."""
    params = _equinox_params("bfloat16")
    opt = _halving(param_rounding="exact")
    updates, state = opt.update(_ones(params), opt.init(params), params)
    with jax.numpy_dtype_promotion("standard"):
        applied = eqx.apply_updates(params, updates)
    assert applied.dense.weight.dtype == jnp.float32
    with pytest.raises(TypeError, match=r"params\..*weight.* as optax\.apply_updates does"):
        opt.update(_ones(params), state, applied)
    assert types_of(apply_updates(params, updates)) == types_of(params)


@pytest.mark.parametrize(
    ("framework", "mask", "path"),
    [
        # Of the whole state, with the running statistics of norms.
        ("nnx.State", lambda: _ndim_tree(nnx.state(_NnxModel())), r"mask\['norm'\].*mean"),
        ("nnx.State", lambda: nnx.State({"dense": True, "norm": True}), "embed"),
        ("nnx.State", lambda: _PREFIX, r"mask\n.*'dict'.*nnx\.statelib\.State"),
        ("linen", lambda: {"params": True}, "params.*Dense_0"),
        ("linen", lambda: _LINEN_PREFIX | {"Dense_0": {"kernel": True}}, r"\['Dense_0'\].*bias"),
        ("equinox", lambda: _without_bias(_ndim_tree(_equinox_params())), r"mask\.dense\.bias"),
        ("haiku", lambda: {"mlp/~/linear_0/w": True}, r"layer_norm.*mlp/~/linear_0"),
        ("dataclass and NamedTuple", lambda: _own_mask(b=None), r"mask\.dense\.b"),
        ("dataclass and NamedTuple", lambda: _own_mask(name="other"), r"mask\.dense.*\('other',\)"),
    ],
)
def test_masks_that_do_not_fit(framework, mask, path):
    """The error at init says where the mask leaves the params, in the terms of the framework."""
    with pytest.raises(ValueError, match=f"(?s)mask and params differ in structure.*{path}"):
        _halving(mask=mask()).init(_PARAMS[framework]())


@pytest.mark.parametrize(
    ("framework", "paths"),
    [
        ("nnx.State", "dense/bias, dense/kernel, embed/embedding"),
        ("linen", "BatchNorm_0/bias, BatchNorm_0/scale, Dense_0/bias"),
        ("equinox", "embed/weight, dense/weight, dense/bias"),
        ("haiku", "embed/embeddings, layer_norm/offset, layer_norm/scale, mlp/~/linear_0/b"),
        ("dataclass and NamedTuple", "dense/w, dense/b, scale"),
    ],
)
def test_patterns_that_match_nothing(framework, paths):
    """The error lists paths as the framework has them."""
    with pytest.raises(ValueError, match=f"'layers' matches no path of params.*{paths}"):
        _halving(mask=masks.matching("layers")).init(_PARAMS[framework]())
