"""Saved and restored by Orbax: each format, in wrappers, on other meshes, and what goes wrong."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as legacy
import pytest
from equality import assert_equal, types_of
from flax import nnx
from gradients import gradients
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates, x64
from orbax.checkpoint import v1 as ocp

import adamaxw

pytestmark = pytest.mark.usefixtures("compile_fast")

_MOMENTS = (None, "bfloat16", "uint8")
_ROUNDINGS = ("nearest", "stochastic", "exact")
_SHAPES = {"w": (8, 8), "s": ()}
_ONE_DEVICE = SingleDeviceSharding(jax.devices()[0])
_SAVED, _STEPS = 5, 11

# Of the reads of a restore that fails Orbax waits for the first alone; the others complain when
# they are collected.
_fails_to_restore = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)


@pytest.fixture
def collected():
    """Makes them complain within the test."""
    yield
    gc.collect()


def _params(dtypes):
    """A tree with the dtypes, each leaf in two shapes, and integers that do not train."""
    rng = np.random.default_rng(1)
    params = {"table": jnp.arange(3)}
    for dtype in dtypes:
        params[dtype] = {
            name: jnp.asarray(rng.normal(size=shape)).astype(dtype)
            for name, shape in _SHAPES.items()
        }
    # As what is restored is, so that one compiled step takes both.
    return jax.device_put(params, _ONE_DEVICE)


def _gradients(params):
    """One tree a step, as a function of the step alone."""

    def of(p):
        if not jnp.issubdtype(p.dtype, jnp.inexact):
            return [jnp.zeros_like(p)] * _STEPS
        return [jnp.asarray(g).astype(p.dtype) for g in gradients("normal", _STEPS, p.shape)]

    columns = jax.tree.map(of, params)
    return [
        jax.tree.map(lambda column, i=i: column[i], columns, is_leaf=lambda x: isinstance(x, list))
        for i in range(_STEPS)
    ]


def _train(opt, run, grads):
    step = jax.jit(opt.update)
    for g in grads:
        updates, state = step(g, run["state"], run["params"])
        run = {"params": apply_updates(run["params"], updates), "state": state}
    return run


def _placed(x, sharding=_ONE_DEVICE):
    return x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _abstract(opt, params):
    """Shapes, dtypes and shardings of a run on one device, from shapes and dtypes of params."""
    run = jax.eval_shape(lambda params: {"params": params, "state": opt.init(params)}, params)
    return jax.tree.map(_placed, run)


def _through_v1(folder, run, abstract):
    ocp.save(folder / "run", run)
    return ocp.load(folder / "run", abstract)


def _through_checkpoint_manager(folder, run, abstract):
    with legacy.CheckpointManager(folder) as manager:
        manager.save(0, args=legacy.args.StandardSave(run))
        return manager.restore(0, args=legacy.args.StandardRestore(abstract))


def _assert_resumes(opt, params, folder, through=_through_v1):
    """A run that is saved, restored and goes on is the one that never stopped, bit for bit."""
    grads = _gradients(params)
    run = _train(opt, {"params": params, "state": opt.init(params)}, grads[:_SAVED])
    restored = through(folder, run, _abstract(opt, params))
    assert types_of(restored) == types_of(run)
    assert_equal(restored, run)
    end = _train(opt, run, grads[_SAVED:])
    assert_equal(_train(opt, restored, grads[_SAVED:]), end)
    trained = [p for p in jax.tree.leaves(end["params"]) if jnp.issubdtype(p.dtype, jnp.inexact)]
    before = [p for p in jax.tree.leaves(run["params"]) if jnp.issubdtype(p.dtype, jnp.inexact)]
    assert all(jnp.any(p != q) for p, q in zip(trained, before, strict=True))


@pytest.mark.parametrize("rounding", _ROUNDINGS)
@pytest.mark.parametrize("moments", _MOMENTS)
def test_resumes_to_the_bit(moments, rounding, tmp_path):
    """In each format and rounding, with parameters of each dtype that both hold."""
    dtypes = ["float32", "bfloat16"]
    if rounding != "exact":
        dtypes.append("float16")
    if moments is None:
        dtypes.append("complex64")
    opt = adamaxw.adamaxw(1e-2, weight_decay=0.1, moment_dtype=moments, param_rounding=rounding)
    _assert_resumes(opt, _params(dtypes), tmp_path)


def test_resumes_to_the_bit_through_a_checkpoint_manager(tmp_path):
    """In the older API of Orbax too."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8", param_rounding="exact")
    _assert_resumes(opt, _params(["bfloat16"]), tmp_path, _through_checkpoint_manager)


@pytest.fixture
def float64():
    """Float64 in all threads; a context manager of JAX reaches none of those of Orbax."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("moments", [None, "uint8"])
def test_resumes_to_the_bit_in_float64(moments, tmp_path):
    """With float64 parameters, whose moments are float64 unless narrower ones are asked for."""
    dtypes = ["float64"] + (["complex128"] if moments is None else [])
    opt = adamaxw.adamaxw(1e-2, weight_decay=0.1, moment_dtype=moments)
    _assert_resumes(opt, _params(dtypes), tmp_path)


def test_float64_of_this_thread_alone_is_lost(tmp_path):
    """What docs/checkpoints.md warns of: restored as float32, without a word."""
    with x64():
        params = {"w": jnp.ones(2, jnp.float64)}
        assert _through_v1(tmp_path, params, jax.tree.map(_placed, params))["w"].dtype == "float32"


_make = functools.partial(
    adamaxw.adamaxw, weight_decay=0.1, moment_dtype="uint8", param_rounding="stochastic"
)


def _matrices(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


_WRAPPERS = {
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(1.0),
        _make(optax.cosine_decay_schedule(1e-2, 100), mask=_matrices),
    ),
    "MultiSteps": lambda: optax.MultiSteps(_make(1e-2), every_k_schedule=3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        _make, static_args=("mask",), hyperparam_dtype=jnp.float32
    )(learning_rate=optax.linear_schedule(1e-2, 0.0, 100), mask=_matrices),
    "masked": lambda: optax.chain(
        optax.masked(_make(1e-2), _matrices),
        optax.masked(
            adamaxw.adamax(1e-2), lambda params: jax.tree.map(lambda p: p.ndim < 2, params)
        ),
    ),
    "partition": lambda: optax.partition(
        {"matrix": _make(1e-2), "rest": adamaxw.adamax(1e-3)},
        lambda params: jax.tree.map(lambda p: "matrix" if p.ndim >= 2 else "rest", params),
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(_make(1e-2), 5),
}


@pytest.mark.usefixtures("standard_promotion")  # The wrappers of Optax promote.
@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_resumes_to_the_bit_in_wrappers(wrapper, tmp_path):
    """The state of a wrapper holds ours; MultiSteps is saved between two of its steps."""
    _assert_resumes(_WRAPPERS[wrapper](), _params(["float32"])["float32"], tmp_path)


def _mesh_shardings(shape):
    """Where the leaves of `_SHAPES` lie on a mesh, or on one device for None."""
    if shape is None:
        return dict.fromkeys(_SHAPES, SingleDeviceSharding(jax.devices()[3]))
    mesh = jax.make_mesh(shape, ("data", "model"))
    specs = {"w": P("data", "model"), "s": P()}
    return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _abstract_on_mesh(opt, params, shardings):
    """As docs/checkpoints.md has it."""
    params = jax.tree.map(_placed, params, shardings)
    of_state = adamaxw.sharding.of_state(opt, params)
    return {"params": params, "state": jax.jit(opt.init, out_shardings=of_state).eval_shape(params)}


@pytest.mark.parametrize(
    ("before", "after", "moments"),
    [((8, 1), (2, 4), "uint8"), ((8, 1), None, "bfloat16"), (None, (4, 2), None)],
)
def test_restores_onto_another_mesh(before, after, moments, tmp_path):
    """From abstract arrays alone: the same bits, where the new mesh wants them, trained on."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moments, param_rounding="exact")
    params = _params(["bfloat16"])["bfloat16"]
    grads = _gradients(params)
    there = jax.device_put(params, _mesh_shardings(before))
    run = {"params": there, "state": opt.init(there)}
    grads_there = [jax.device_put(g, _mesh_shardings(before)) for g in grads]
    run = _train(opt, run, grads_there[:_SAVED])

    shardings = _mesh_shardings(after)
    abstract = _abstract_on_mesh(opt, params, shardings)
    restored = _through_v1(tmp_path, run, abstract)
    assert_equal(restored, run)
    for tree in (restored["params"], restored["state"].mu, restored["state"].residual):
        for name, sharding in shardings.items():
            assert tree[name].sharding == sharding
    # The run that never stopped, on the same devices: across meshes last bits may differ.
    moved = jax.device_put(run, jax.tree.map(lambda x: x.sharding, abstract))
    grads_here = [jax.device_put(g, shardings) for g in grads[_SAVED:]]
    assert_equal(_train(opt, restored, grads_here), _train(opt, moved, grads_here))


def test_saving_in_the_background_copies(tmp_path):
    """The step after `save_async` may be given what is being saved, to be overwritten."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8")
    params = {"w": jnp.ones((512, 512))}
    run = {"params": params, "state": opt.init(params)}

    @functools.partial(jax.jit, donate_argnums=0)
    def step(run):
        updates, state = opt.update(run["params"], run["state"], run["params"])
        return {"params": optax.apply_updates(run["params"], updates), "state": state}

    run = step(run)
    saved = jax.tree.map(np.array, run)
    response = ocp.save_async(tmp_path / "run", run)
    for _ in range(5):
        run = step(run)
    response.result()
    assert_equal(ocp.load(tmp_path / "run", _abstract(opt, params)), saved)


def _leaves(tree):
    """Name and dtype of each leaf, as docs/checkpoints.md compares them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(jax.tree_util.keystr(path, simple=True, separator="/"), x.dtype) for path, x in leaves}


@pytest.mark.parametrize("moments", _MOMENTS)
def test_leaves_are_saved_under_their_names(moments, tmp_path):
    """Fields by name, not by place; what is None has none."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moments, param_rounding="exact")
    params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    state = opt.init(params)
    ocp.save(tmp_path / "state", state)
    saved = _leaves(ocp.metadata(tmp_path / "state").metadata)
    expected = {"count", "mu/w", "mu/b", "nu/w", "nu/b", "residual/w", "residual/b"}
    assert {name for name, _ in saved} == expected | ({"nu_scale", "seed"} if moments else set())
    assert saved == _leaves(state)


@pytest.mark.parametrize("wanted", _MOMENTS)
@pytest.mark.parametrize("saved", _MOMENTS)
def test_another_moment_dtype_is_cast_but_seen_in_the_metadata(saved, wanted, tmp_path):
    """Orbax says nothing, so docs/checkpoints.md compares; `update` misses a scale alone."""
    params = {"w": jnp.ones(2)}
    old, new = (adamaxw.adamaxw(1e-2, moment_dtype=moments) for moments in (saved, wanted))
    abstract = jax.tree.map(_placed, jax.eval_shape(new.init, params))
    restored = _through_v1(tmp_path, old.init(params), abstract)
    metadata = ocp.metadata(tmp_path / "run").metadata
    assert (_leaves(metadata) == _leaves(abstract)) == (saved == wanted)
    if saved is None and wanted is not None:
        with pytest.raises(TypeError, match=r"nu_scale must be a float32 scalar"):
            new.update(params, restored, params)


@_fails_to_restore
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p | {"w": jnp.ones((4, 8))}, r"\(4, 8\).*\(8, 8\)"),
        (lambda p: p | {"w": jnp.ones(64)}, r"\(64,\).*\(8, 8\)"),
        (lambda p: p | {"new": jnp.ones(2)}, r"params\.new"),
        (lambda p: {"w": p["w"]}, r"params\.s"),
    ],
)
def test_other_params_are_an_error_of_orbax(change, words, tmp_path):
    """It names the shapes, or the leaves that one of the two does not have."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8")
    params = _params(["float32"])["float32"]
    run = {"params": params, "state": opt.init(params)}
    with pytest.raises(ValueError, match=words):
        _through_v1(tmp_path, run, _abstract(opt, change(params)))


@_fails_to_restore
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("saved", _ROUNDINGS[1:])
def test_another_rounding_is_an_error_of_orbax(saved, tmp_path):
    """A residual is there, or it is not: named by its path."""
    wanted = "exact" if saved == "stochastic" else "stochastic"
    params = _params(["bfloat16"])["bfloat16"]
    opt = adamaxw.adamaxw(1e-2, param_rounding=saved)
    run = {"params": params, "state": opt.init(params)}
    other = adamaxw.adamaxw(1e-2, param_rounding=wanted)
    with pytest.raises(ValueError, match=r"state\.residual"):
        _through_v1(tmp_path, run, _abstract(other, params))


def test_params_of_another_dtype_are_an_error_of_update(tmp_path):
    """With the residual of a float32 parameter beside what is now bfloat16."""
    opt = adamaxw.adamaxw(1e-2, param_rounding="exact")
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "b": jnp.ones(8)}
    run = {"params": params, "state": opt.init(params)}
    abstract = _abstract(opt, params)
    abstract["params"]["b"] = abstract["params"]["b"].update(dtype=jnp.bfloat16)
    restored = _through_v1(tmp_path, run, abstract)
    with pytest.raises(TypeError, match=r"state\.residual\['b'\] must be int16"):
        opt.update(restored["params"], restored["state"], restored["params"])


@pytest.mark.parametrize("wanted", _MOMENTS)
@pytest.mark.parametrize("saved", _MOMENTS)
def test_change_of_format(saved, wanted, tmp_path):
    """Restored as it was saved, then converted: as if converted without having been saved."""
    params = _params(["bfloat16"])["bfloat16"]
    grads = _gradients(params)
    old = adamaxw.adamaxw(1e-2, moment_dtype=saved, param_rounding="exact")
    new = adamaxw.adamaxw(1e-2, moment_dtype=wanted, param_rounding="exact")
    run = _train(old, {"params": params, "state": old.init(params)}, grads[:_SAVED])
    restored = _through_v1(tmp_path, run, _abstract(old, params))

    def go_on(run):
        state = adamaxw.moments.convert(run["state"], new.init(params))
        return _train(new, {"params": run["params"], "state": state}, grads[_SAVED:])

    assert_equal(go_on(restored), go_on(run))


def test_flax_nnx_optimizer(tmp_path):
    """The state of an nnx.Optimizer goes into a new one, which ends in the same bits."""

    def make():
        model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(
            model, adamaxw.adamaxw(1e-2, moment_dtype="uint8"), wrt=nnx.Param
        )

    x = jnp.asarray(gradients("normal", 1, (16, 8))[0])

    def train(model, optimizer):
        for _ in range(4):
            optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))
        return nnx.to_pure_dict(nnx.state((model, optimizer)))

    model, optimizer = make()
    saved = train(model, optimizer)
    ocp.save(tmp_path / "run", saved)
    new = make()
    abstract = jax.tree.map(_placed, nnx.to_pure_dict(nnx.state(new)))
    state = nnx.state(new)
    nnx.replace_by_pure_dict(state, ocp.load(tmp_path / "run", abstract))
    nnx.update(new, state)
    assert_equal(nnx.to_pure_dict(nnx.state(new)), saved)
    assert_equal(train(*new), train(model, optimizer))
