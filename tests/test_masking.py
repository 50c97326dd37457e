"""Masks: every form that decides which leaves decay, and every one that is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adamaxw

_PARAMS = {"dense": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "scale": jnp.ones(3)}
_ONLY_W = {"dense": {"w": True, "b": False}, "scale": False}


def _matrices(tree):
    return jax.tree.map(lambda x: x.ndim == 2, tree)


def _decayed(mask, params=_PARAMS):
    """Which leaves change in a step without gradients."""
    opt = adamaxw.adamaxw(0.1, weight_decay=0.5, mask=mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(opt.update)(zeros, opt.init(params), params)
    # An exact decay where there is one, an exact zero where there is none.
    for update in jax.tree.leaves(updates):
        assert np.all(update == 0) or np.allclose(update, -0.05, rtol=1e-6)
    return jax.tree.map(lambda u: bool(np.all(u != 0)), updates)


@pytest.mark.parametrize(
    "mask",
    [
        _ONLY_W,
        _matrices,
        {"dense": {"w": np.bool_(True), "b": np.array(False)}, "scale": jnp.array(False)},
        lambda params: {"dense": _matrices(params["dense"]), "scale": False},
        jax.tree_util.Partial(_matrices),
    ],
)
def test_forms_of_one_mask(mask):
    """A tree, a function, a function that returns a prefix, any kind of boolean."""
    assert _decayed(mask) == _ONLY_W


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, {"dense": {"w": True, "b": True}, "scale": True}),
        (True, {"dense": {"w": True, "b": True}, "scale": True}),
        (False, {"dense": {"w": False, "b": False}, "scale": False}),
        ({"dense": True, "scale": False}, {"dense": {"w": True, "b": True}, "scale": False}),
        (lambda params: False, {"dense": {"w": False, "b": False}, "scale": False}),
    ],
)
def test_prefixes(mask, expected):
    """A boolean in place of a subtree holds for all of it."""
    assert _decayed(mask) == expected


def test_a_function_is_given_the_params():
    """At init and at update it sees params, though Optax would show it gradients."""
    seen = []

    def mask(tree):
        seen.append(tree["w"].dtype)
        return {"w": True}

    params, grads = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}
    opt = adamaxw.adamaxw(0.1, mask=mask)
    opt.update(grads, opt.init(params), params)
    assert seen == [jnp.bfloat16, jnp.bfloat16]


def test_a_module_that_is_callable_can_be_the_tree():
    """Equinox modules have a __call__, also when their leaves are booleans."""
    model = eqx.filter(eqx.nn.Linear(2, 2, key=jax.random.key(0)), eqx.is_inexact_array)
    mask = jax.tree.map(lambda p: p.ndim == 2, model)
    assert callable(mask)
    decayed = _decayed(mask, jax.tree.map(jnp.ones_like, model))
    assert (decayed.weight, decayed.bias) == (True, False)


@pytest.mark.parametrize("mask", [True, False])
def test_a_lone_boolean_beside_arrays(mask):
    """It may be a mask that inject_hyperparams has called: the error says what to pass instead."""
    for opt in (
        lambda: adamaxw.adamaxw(jnp.float32(0.1), mask=mask),
        lambda: optax.inject_hyperparams(adamaxw.adamaxw, "mask")(0.1, mask=mask).init(_PARAMS),
    ):
        with pytest.raises(TypeError, match=r"pass mask=None .*, weight_decay=0 "):
            opt()


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        ({"dense": {"w": 1, "b": False}, "scale": False}, r"\['dense'\]\['w'\]"),
        ({"dense": {"w": True, "b": "no"}, "scale": False}, r"\['dense'\]\['b'\]"),
        ({"dense": True, "scale": jnp.array([True, False, True])}, r"\['scale'\]"),
        ({"dense": True, "scale": jnp.array(1.0)}, r"\['scale'\]"),
        ({"dense": True, "scale": jax.ShapeDtypeStruct((), bool)}, r"\['scale'\]"),
        (lambda params: params, r"\['dense'\]\['b'\]"),
        (lambda params: jax.tree.map(lambda p: p.ndim, params), r"\['dense'\]\['b'\]"),
        (lambda params: None, ""),
    ],
)
def test_leaves_that_are_no_booleans(mask, path):
    """Refused at init, with the path; a None where params have a leaf is another structure."""
    with pytest.raises((TypeError, ValueError), match=rf"(?s)mask.*{path}") as error:
        adamaxw.adamaxw(0.1, mask=mask).init(_PARAMS)
    # Where there is a path, the mask is a tree, and inject_hyperparams did not call it.
    assert "inject_hyperparams" not in str(error.value)


def test_traced_masks():
    """What decays must be known when the step is compiled."""

    @jax.jit
    def init(flag):
        return adamaxw.adamaxw(0.1, mask={"dense": flag, "scale": True}).init(_PARAMS)

    with pytest.raises(TypeError, match=r"mask\['dense'\] must be .* traced bool"):
        init(True)


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        ({"dense": True}, "scale"),
        ({"dense": True, "scale": True, "extra": True}, "extra"),
        ({"dense": {"w": True}, "scale": True}, r"mask\['dense'\]"),
        ({"dense": {"w": {"deeper": True}, "b": True}, "scale": True}, r"mask\['dense'\]\['w'\]"),
        ({"dense": [True, True], "scale": True}, r"mask\['dense'\]"),
        ({"dense": None, "scale": True}, r"mask\['dense'\]"),
        (lambda params: {"dense": True}, "scale"),
    ],
)
def test_trees_that_are_no_prefix(mask, path):
    """Refused at init, with where the mask leaves the params."""
    opt = adamaxw.adamaxw(0.1, mask=mask)
    with pytest.raises(ValueError, match=f"(?s)mask and params differ in structure.*{path}"):
        opt.init(_PARAMS)


@pytest.mark.parametrize(
    "mask",
    [
        lambda params: jax.tree.map(lambda p: p.ndim != 1, params),
        lambda params: jax.tree.map(lambda p: p.ndim == 2, params),
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: "b" in str(path), params),
        lambda params: jax.tree.map(lambda p: p.size, params),
    ],
)
@pytest.mark.parametrize("others", [{}, {"b1": 0.9, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}])
def test_a_mask_that_inject_hyperparams_called_is_refused(mask, others):
    """It is called with the count, which has no leaves to choose from: never silent."""
    with pytest.raises(TypeError, match=r"static_args=\('mask',\)"):
        optax.inject_hyperparams(adamaxw.adamaxw)(0.1, mask=mask, **others).init(_PARAMS)


def test_inject_hyperparams_with_static_args_decays_by_the_mask():
    """The way round that the error names."""
    inject = optax.inject_hyperparams(adamaxw.adamaxw, static_args=("mask",))
    opt = inject(0.1, weight_decay=0.5, mask=_matrices)
    zeros = jax.tree.map(jnp.zeros_like, _PARAMS)
    updates, _ = jax.jit(opt.update)(zeros, opt.init(_PARAMS), _PARAMS)
    assert jax.tree.map(lambda u: bool(np.all(u != 0)), updates) == _ONLY_W
