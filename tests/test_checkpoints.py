"""Checkpoints of several libraries: each format, in wrappers, on other meshes, and what fails."""

import functools
import itertools
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as legacy
import pytest
from cases import MOMENTS, WRAPPERS, make_params
from equality import assert_equal, types_of
from flax.serialization import from_bytes, to_bytes
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

import adamaxw

pytestmark = pytest.mark.usefixtures("compile_fast")

_ONE_DEVICE = SingleDeviceSharding(jax.devices()[0])


def _params(*dtypes):
    """A matrix and a scalar of each dtype, and integers, which do not train."""
    values = {"w": jnp.linspace(0.5, 2, 6).reshape(2, 3), "s": jnp.ones(())}
    rows = itertools.product(dtypes, values.items())
    return {f"{dtype}_{name}": x.astype(dtype) for dtype, (name, x) in rows} | {"i": jnp.arange(3)}


_HALF = _params("bfloat16")


def _placed(x, sharding=_ONE_DEVICE):
    return x if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _begun(opt, params):
    return {"params": params, "state": opt.init(params)}


def _abstract(opt, params):
    """Shapes, dtypes and shardings of a run on one device, as docs/checkpoints.md makes them."""
    return jax.tree.map(_placed, jax.eval_shape(partial(_begun, opt), params))


_opt = functools.cache(partial(adamaxw.adamaxw, 1e-1))


@functools.cache
def _step(opt):
    def step(run):  # the gradients are the parameters
        updates, state = opt.update(run["params"], run["state"], run["params"])
        return {"params": apply_updates(run["params"], updates), "state": state}

    return jax.jit(step)


def _orbax(folder, run, abstract):
    ocp.save(folder / "run", run)
    return ocp.load(folder / "run", abstract)


def _checkpoint_manager(folder, run, abstract):
    with legacy.CheckpointManager(folder) as manager:
        manager.save(0, args=legacy.args.StandardSave(run))
        return manager.restore(0, args=legacy.args.StandardRestore(abstract))


def _safetensors(folder, run, abstract):
    """Saved as bits and viewed again, as libraries need that do not know bfloat16."""
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(run))}
    bits = {name: x.view(f"u{x.dtype.itemsize}") for name, x in leaves.items()}
    save_file(bits, folder / "run.safetensors")
    restored = load_file(folder / "run.safetensors")
    like, structure = jax.tree.flatten(abstract)
    rows = zip(leaves, like, strict=True)
    return structure.unflatten(restored[name].view(x.dtype) for name, x in rows)


_LIBRARIES = {
    "CheckpointManager": _checkpoint_manager,
    "pickle": lambda folder, run, abstract: pickle.loads(pickle.dumps(run)),
    "msgpack": lambda folder, run, abstract: from_bytes(abstract, to_bytes(run)),
    "safetensors": _safetensors,
}


def _assert_resumes(opt, params, folder, through=_orbax):
    """A saved and restored run has the bits of the one that goes on, then and three steps later."""
    step = _step(opt)
    run = step(step(jax.device_put(_begun(opt, params), _ONE_DEVICE)))
    restored = through(folder, run, _abstract(opt, params))
    assert types_of(restored) == types_of(run)
    for _ in range(3):
        assert_equal(restored, run)
        run, restored = step(run), step(restored)
    assert_equal(restored, run)
    for start, p in zip(jax.tree.leaves(params), jax.tree.leaves(run["params"]), strict=True):
        assert np.all(p != start) == jnp.issubdtype(p.dtype, jnp.inexact)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_resumes_bit_for_bit(moments, rounding, tmp_path):
    """Orbax restores the parameters and the state in each format and rounding."""
    _assert_resumes(_opt(moment_dtype=moments, param_rounding=rounding), _HALF, tmp_path)


@pytest.mark.parametrize("rounding", ["stochastic", "exact"])
@pytest.mark.parametrize("library", _LIBRARIES)
def test_resumes_bit_for_bit_through_other_libraries(library, rounding, tmp_path):
    """Orbax's older API and three other formats keep codes, bfloat16, residual and seed."""
    opt = _opt(moment_dtype="uint8", param_rounding=rounding)
    _assert_resumes(opt, _HALF, tmp_path, _LIBRARIES[library])


@pytest.fixture
def float64():
    """Float64 in all threads; the context manager of JAX does not reach those of Orbax."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("moments", [None, "uint8"])
def test_resumes_bit_for_bit_with_every_dtype(moments, tmp_path):
    """Beside each other: floating, complex where the format takes it, and integers."""
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    dtypes += ["complex64", "complex128"] if moments is None else []
    opt = _opt(moment_dtype=moments, param_rounding="stochastic")
    _assert_resumes(opt, _params(*dtypes), tmp_path)


_INJECT = "inject_hyperparams, scheduled"


@pytest.mark.usefixtures("standard_promotion")  # The wrappers of Optax promote.
@pytest.mark.parametrize(
    "wrapper",
    ["chain", "MultiSteps", _INJECT, "masked", "partition", "apply_if_finite"],
)
def test_resumes_bit_for_bit_in_wrappers(wrapper, tmp_path):
    """The state of each wrapper contains ours; MultiSteps is saved between two of its steps."""
    make = partial(adamaxw.adamaxw, moment_dtype="uint8", param_rounding="stochastic")
    _assert_resumes(WRAPPERS[wrapper](make), make_params(), tmp_path)


def _shardings(shape):
    """On a mesh, or on one device for None."""
    if shape is None:
        return dict.fromkeys("ws", SingleDeviceSharding(jax.devices()[3]))
    mesh = jax.make_mesh(shape, ("data", "model"))
    return {"w": NamedSharding(mesh, P("data", "model")), "s": NamedSharding(mesh, P())}


@pytest.mark.parametrize(
    ("before", "after", "moments"),
    [((8, 1), (2, 4), "uint8"), ((8, 1), None, "bfloat16"), (None, (4, 2), None)],
)
def test_restores_onto_another_mesh(before, after, moments, tmp_path):
    """From abstract arrays alone: the same bits, in the shardings of the new mesh."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype=moments, param_rounding="exact")
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "s": jnp.ones((), jnp.bfloat16)}
    there = jax.device_put(params, _shardings(before))
    run = _step(opt)(_begun(opt, there))

    shardings = _shardings(after)
    abstract = jax.tree.map(_placed, params, shardings)
    of_state = adamaxw.sharding.of_state(opt, abstract)
    state = jax.jit(opt.init, out_shardings=of_state).eval_shape(abstract)
    restored = _orbax(tmp_path, run, {"params": abstract, "state": state})
    assert_equal(restored, run)
    for tree in (restored["params"], restored["state"].mu, restored["state"].residual):
        assert {name: x.sharding for name, x in tree.items()} == shardings
    _step(opt)(restored)


def test_saving_in_the_background_copies(tmp_path):
    """The step after `save_async` may be given what is being saved, to be overwritten."""
    opt = adamaxw.adamaxw(1e-2, moment_dtype="uint8")
    params = {"w": jnp.ones((512, 512))}
    step = jax.jit(_step(opt), donate_argnums=0)
    run = step(_begun(opt, params))
    saved = jax.tree.map(np.array, run)
    response = ocp.save_async(tmp_path / "run", run)
    for _ in range(5):
        run = step(run)
    response.result()
    assert_equal(ocp.load(tmp_path / "run", _abstract(opt, saved["params"])), saved)


def _leaves(tree):
    """Name and dtype of each leaf, as docs/checkpoints.md compares them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {(jax.tree_util.keystr(path, simple=True, separator="/"), x.dtype) for path, x in leaves}


@pytest.mark.parametrize("wanted", MOMENTS)
@pytest.mark.parametrize("saved", MOMENTS)
def test_the_metadata_shows_names_and_format(saved, wanted, tmp_path):
    """Fields by name; Orbax casts to another format without an error, so the docs compare."""
    params, old, new = {"w": jnp.ones(2)}, _opt(moment_dtype=saved), _opt(moment_dtype=wanted)
    abstract = jax.tree.map(_placed, jax.eval_shape(new.init, params))
    restored = _orbax(tmp_path, old.init(params), abstract)
    metadata = _leaves(ocp.metadata(tmp_path / "run").metadata)
    names = {"count", "mu/w", "nu/w"} | ({"nu_scale", "seed"} if saved else set())
    assert {name for name, _ in metadata} == names
    assert (metadata == _leaves(abstract)) == (saved == wanted)
    if saved is None and wanted is not None:
        with pytest.raises(TypeError, match="nu_scale"):
            new.update(params, restored, params)


def test_a_residual_without_a_place_is_an_error_of_orbax(tmp_path):
    """As docs/checkpoints.md says."""
    exact, nearest = _opt(param_rounding="exact"), _opt()
    with pytest.raises(ValueError, match=r"state\.residual"):
        _orbax(tmp_path, _begun(exact, _HALF), _abstract(nearest, _HALF))
