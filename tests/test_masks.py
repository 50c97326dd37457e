"""Masks in every form: what they choose, wherever a mask can be, and what is refused."""

import functools
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from cases import REFUSED
from flax import nnx
from pure import as_pure

import adamaxw
from adamaxw import masks

pytestmark = pytest.mark.usefixtures("compile_fast", "standard_promotion")

_PARAMS = {
    "embed": {"w": jnp.ones((4, 2))},
    "blocks": [
        {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "scale": jnp.ones(())},
        {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(())},
    ],
}
_ZEROS = jax.tree.map(jnp.zeros_like, _PARAMS)
_MATRICES = ["blocks/0/w", "blocks/1/w", "embed/w"]


def _rank_2(tree):
    return jax.tree.map(lambda x: x.ndim >= 2, tree)


def _chosen(flags):
    """The paths of the leaves that are True."""
    leaves = jax.tree_util.tree_leaves_with_path(flags)
    assert all(isinstance(chosen, bool) for _, chosen in leaves)
    return sorted(
        jax.tree_util.keystr(path, simple=True, separator="/") for path, chosen in leaves if chosen
    )


_LAST = ["blocks/1/b", "blocks/1/scale", "blocks/1/w", "embed/w"]
_BIASES = ["blocks/0/b", "blocks/1/b"]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, ["blocks/0/b", "blocks/0/scale", "blocks/0/w", *_LAST]),
        (True, ["blocks/0/b", "blocks/0/scale", "blocks/0/w", *_LAST]),
        (False, []),
        (lambda params: False, []),
        (_rank_2, _MATRICES),
        (jax.tree_util.Partial(_rank_2), _MATRICES),
        (_rank_2(_PARAMS), _MATRICES),
        (jax.tree.map(jnp.asarray, _rank_2(_PARAMS)), _MATRICES),
        ({"embed": True, "blocks": False}, ["embed/w"]),
        (lambda p: {"embed": {"w": False}, "blocks": _rank_2(p["blocks"])}, _MATRICES[:2]),
        (masks.matrices, _MATRICES),
        (masks.matching("/b$"), _BIASES),
        (masks.matching(["/b$", "1/scale"]), [*_BIASES, "blocks/1/scale"]),
        (masks.matching(exclude=["blocks/.*", "nothing|embed"]), []),
        (masks.matching("w$", exclude="^blocks/0/"), _MATRICES[1:]),
        (masks.matrices & ~masks.matching("embed"), _MATRICES[:2]),
        (masks.matching("/b$") | masks.matching("embed"), [*_BIASES, "embed/w"]),
        (~(masks.rank(1) | masks.matching("0/scale")), ["blocks/1/scale"]),
        (masks.matrices & (lambda p: {"embed": False, "blocks": True}), _MATRICES[:2]),
        ((lambda p: False) | masks.matching("embed"), ["embed/w"]),
    ],
)
def test_what_decays(mask, expected):
    """A tree, a prefix of one, a function, a ready mask, by rank, by path, and combined.

    An exact decay where the mask is True, and exact zeros elsewhere.
    """
    opt = adamaxw.adamaxw(0.1, weight_decay=0.5, mask=mask)
    updates, _ = opt.update(_ZEROS, opt.init(_PARAMS), _PARAMS)
    decays = jax.tree.map(lambda u: bool(np.allclose(u, -0.05, rtol=1e-6)), updates)
    assert _chosen(decays) == expected
    jax.tree.map(lambda flag, u: flag or np.testing.assert_array_equal(u, 0), decays, updates)
    if isinstance(mask, masks.Mask):
        assert mask(jax.eval_shape(lambda: _PARAMS)) == mask(_PARAMS) == decays


def test_a_function_is_given_the_params():
    """At init and at update, though Optax would show it gradients."""
    seen = []

    def mask(tree):
        seen.append(tree["w"].dtype)
        return {"w": True}

    params, grads = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.ones(2)}
    opt = adamaxw.adamaxw(0.1, mask=mask)
    opt.update(grads, opt.init(params), params)
    assert seen == [jnp.bfloat16, jnp.bfloat16]


def test_a_module_of_booleans():
    """Is a tree, though it can be called."""
    params = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    mask = _rank_2(params)
    assert callable(mask)
    opt, zeros = adamaxw.adamaxw(0.1, mask=mask), jax.tree.map(jnp.zeros_like, params)
    updates, _ = opt.update(zeros, opt.init(params), params)
    assert jax.tree.map(lambda u: bool(np.any(u)), updates) == mask


def test_what_has_no_ndim():
    """Python numbers and abstract arrays have a rank; optax.tree.map_params has a tree of none."""
    params = {"number": 1.0, "array": np.ones((2, 2)), "s": jax.ShapeDtypeStruct((2,), "float32")}
    assert masks.rank(np.int64(1))(params) == {"number": False, "array": True, "s": True}
    opt = adamaxw.adamaxw(0.1, mask=masks.matching("w$"))
    mapped = optax.tree.map_params(opt, lambda x: x + 1, opt.init(_PARAMS))
    assert np.all(mapped.mu["embed"]["w"] == 1)


@pytest.mark.parametrize("mask", [masks.matrices, ~masks.matching("/b$|scale"), _rank_2])
def test_in_inject_hyperparams(mask):
    """A ready mask goes without `static_args`, and the state stays a tree of arrays."""
    direct = adamaxw.adamaxw(0.1, weight_decay=0.5, mask=mask)
    expected = direct.update(_ZEROS, direct.init(_PARAMS), _PARAMS)[0]
    for static_args in [("mask",), ()] if isinstance(mask, masks.Mask) else [("mask",)]:
        inject = optax.inject_hyperparams(adamaxw.adamaxw, static_args=static_args)
        opt = inject(optax.constant_schedule(0.1), weight_decay=0.5, mask=mask)
        state = opt.init(_PARAMS)
        updates, new = jax.jit(opt.update)(_ZEROS, state, _PARAMS)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
        for other in (new, opt.init(_PARAMS), jax.eval_shape(opt.init, _PARAMS)):
            assert jax.tree.structure(other) == jax.tree.structure(state)


def test_flax_nnx():
    """A Variable may hold a tree; with and without Variables a mask chooses the same."""
    params = nnx.State({"w": nnx.Param(_PARAMS["embed"] | {"b": jnp.ones(2)})})
    opt, zeros = adamaxw.adamaxw(0.1, mask=masks.matrices), jax.tree.map(jnp.zeros_like, params)
    # As nnx.Optimizer calls them.
    updates, _ = opt.update(*map(as_pure, (zeros, opt.init(params), params)))
    assert _chosen(jax.tree.map(lambda u: bool(np.any(u)), updates)) == ["w/w"]
    tables = [str(masks.describe(p, masks.matrices)) for p in (params, as_pure(params))]
    assert tables[0] == tables[1]


_ONES = {"dense": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "scale": jnp.ones(3)}


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        ({"dense": {"w": 1, "b": False}, "scale": False}, r"\['dense'\]\['w'\]"),
        ({"dense": {"w": True, "b": "no"}, "scale": False}, r"\['dense'\]\['b'\]"),
        ({"dense": True, "scale": jnp.array([True, False, True])}, r"\['scale'\]"),
        ({"dense": True, "scale": jax.ShapeDtypeStruct((), bool)}, r"\['scale'\]"),
        (lambda params: params, r"\['dense'\]\['b'\]"),
        (lambda params: None, ""),
        (masks.matrices & (lambda params: {"dense": 1, "scale": True}), r"\['dense'\]"),
        ({"dense": True}, "scale"),
        ({"dense": True, "scale": True, "extra": True}, "extra"),
        ({"dense": {"w": {"deeper": True}, "b": True}, "scale": True}, r"\['dense'\]\['w'\]"),
        ({"dense": [True, True], "scale": True}, r"\['dense'\]"),
        (lambda params: {"dense": True}, "scale"),
    ],
)
def test_trees_that_do_not_fit_are_refused(mask, path):
    """Leaves that are not booleans, and trees that are no prefix of params; the path is named."""
    with pytest.raises(REFUSED, match=f"(?s)mask.*{path}") as error:
        adamaxw.adamaxw(0.1, mask=mask).init(_ONES)
    # optax.inject_hyperparams does not call trees.
    assert "inject_hyperparams" not in str(error.value)


def test_a_traced_mask_is_refused():
    """What decays must be known when the step is compiled."""
    with pytest.raises(TypeError, match=r"mask\['dense'\]"):
        jax.jit(lambda x: adamaxw.adamaxw(0.1, mask={"dense": x, "scale": True}).init(_ONES))(True)


@pytest.mark.parametrize("others", [{}, {"b1": 0.9, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.1}])
@pytest.mark.parametrize(
    "mask",
    [_rank_2, lambda tree: jax.tree.map(lambda p: p.size, tree), True, False],
)
def test_a_mask_that_inject_hyperparams_called_is_refused(mask, others):
    """It is called with the count, which has no leaves to choose from; so is a lone boolean.

    Beside arrays a boolean may be what the call has returned.
    """
    opt = optax.inject_hyperparams(adamaxw.adamaxw)(0.1, mask=mask, **others)
    with pytest.raises(TypeError, match="mask"):
        opt.init(_ONES)


def test_bad_masks_are_refused():
    """When they are made; a pattern that matches nothing at init, where the paths are known."""
    for make, named in (
        (lambda: masks.matrices and masks.rank(1), "masks"),
        (lambda: masks.matrices & {"w": True}, "unsupported operand"),
    ):
        with pytest.raises(TypeError, match=named):
            make()
    mask = masks.matrices & ~masks.matching("w", exclude=["embed", "norm"])
    with pytest.raises(ValueError, match=r"norm.*blocks/0/b, blocks/0/scale"):
        adamaxw.adamaxw(0.1, mask=mask).init(_PARAMS)


def test_masks_made_alike_are_equal():
    """And hashable, so that jit compiles once for both; the repr makes an equal one."""
    assert masks.rank(2) == masks.matrices
    assert masks.matching(["a"], exclude=["b"]) == masks.matching("a", exclude="b")
    a, b, c = masks.rank(1), masks.matching("a"), masks.matching(["b", "c"], exclude="d")
    different = [a, b, c, ~a, ~~b | a & c, (a | b) & ~c, ~(a & b), a & (b & c), a | (b | c)]
    for i, mask in enumerate(different):
        same = eval(repr(mask))
        assert (same, hash(same), repr(same)) == (mask, hash(mask), repr(mask))
        assert [other == mask for other in different].index(True) == i


def test_describe():
    """Empty leaves decay and integers do not; rich prints the same cells, brackets included."""
    params = {
        "[red]": jnp.ones((20, 100), jnp.bfloat16),
        "b": jnp.ones(3),
        "steps": jnp.zeros(5, jnp.int32),
        "empty": jnp.zeros((0, 4)),
    }
    table = masks.describe(jax.eval_shape(lambda: params), masks.matching("red|steps|empty"))
    assert table.rows == (
        ("[red]", "(20, 100)", "bfloat16", "2,000", "yes"),
        ("b", "(3,)", "float32", "3", "no"),
        ("empty", "(0, 4)", "float32", "0", "yes"),
        ("steps", "(5,)", "int32", "5", "no"),
    )
    assert [row[3] for row in table.footer] == ["2,000", "8", "2,008"]
    console = rich.console.Console(width=80, file=io.StringIO())
    console.print(table)
    assert all(cell in console.file.getvalue() for row in table.rows for cell in row)
