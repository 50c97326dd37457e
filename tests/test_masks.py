"""The ready masks: what they choose, in every place where a mask can be, and what they refuse."""

import functools
import io

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from flax import nnx
from pure import as_pure

import adamaxw
from adamaxw import masks

pytestmark = pytest.mark.usefixtures("compile_fast")

_PARAMS = {
    "embed": {"w": jnp.ones((4, 2))},
    "blocks": [
        {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "scale": jnp.ones(())},
        {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "scale": jnp.ones(())},
    ],
}


def _chosen(mask, params=_PARAMS):
    """The paths of the leaves that it chooses."""
    leaves = jax.tree_util.tree_leaves_with_path(mask(params))
    assert all(isinstance(chosen, bool) for _, chosen in leaves)
    paths = (
        jax.tree_util.keystr(path, simple=True, separator="/") for path, chosen in leaves if chosen
    )
    return sorted(paths)


def _decayed(opt, params):
    """Which leaves change in a step without gradients, under jit."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = opt.init(params)
    updates, after = jax.jit(opt.update)(zeros, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    return jax.tree.map(lambda u: bool(np.any(u != 0)), updates)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (masks.matrices, ["blocks/0/w", "blocks/1/w", "embed/w"]),
        (masks.rank(3), []),
        (masks.matching("embed"), ["embed/w"]),
        (
            masks.matching("^b"),
            [f"blocks/{i}/{name}" for i in (0, 1) for name in ("b", "scale", "w")],
        ),
        (masks.matching("/b$"), ["blocks/0/b", "blocks/1/b"]),
        (masks.matching(["/b$", "1/scale"]), ["blocks/0/b", "blocks/1/b", "blocks/1/scale"]),
        (masks.matching(exclude=["blocks/.*", "nothing|embed"]), []),
        (masks.matching("w$", exclude="^blocks/0/"), ["blocks/1/w", "embed/w"]),
        (masks.matrices & ~masks.matching("embed"), ["blocks/0/w", "blocks/1/w"]),
        (masks.matching("/b$") | masks.matching("embed"), ["blocks/0/b", "blocks/1/b", "embed/w"]),
        (~masks.matrices & masks.rank(1), ["blocks/0/b", "blocks/1/b"]),
        (~(masks.rank(1) | masks.matching("0/scale")), ["blocks/1/scale"]),
        (
            masks.matrices & (lambda p: {"embed": False, "blocks": True}),
            ["blocks/0/w", "blocks/1/w"],
        ),
        ((lambda p: False) | masks.matching("embed"), ["embed/w"]),
        ((lambda p: True) & masks.matching("embed"), ["embed/w"]),
    ],
    ids=repr,
)
def test_what_a_mask_chooses(mask, expected):
    """By rank, by path, and combined, also with functions; the same leaves decay."""
    assert _chosen(mask) == expected
    abstract = jax.eval_shape(lambda: _PARAMS)
    assert mask(abstract) == mask(_PARAMS)
    opt = adamaxw.adamaxw(0.1, weight_decay=0.5, mask=mask)
    assert _decayed(opt, _PARAMS) == mask(_PARAMS)


def test_rank_0_chooses_all():
    """Scalars, Python numbers and NumPy arrays have a rank, too."""
    params = {
        "number": 1.0,
        "array": np.ones((2, 2)),
        "struct": jax.ShapeDtypeStruct((2,), "float32"),
    }
    assert all(masks.rank(0)(params).values())
    assert masks.rank(1)(params) == {"number": False, "array": True, "struct": True}
    assert masks.rank(np.int64(1)) == masks.rank(1)


@pytest.mark.parametrize(
    "mask", [masks.matrices, masks.matching("w$"), ~masks.matching("/b$|scale")]
)
@pytest.mark.parametrize("static_args", [(), ("mask",)])
def test_in_inject_hyperparams(mask, static_args):
    """With and without `static_args`, where another function would be called with the count."""
    inject = optax.inject_hyperparams(adamaxw.adamaxw, static_args=static_args)
    schedule = optax.linear_schedule(0.1, 0.2, 10)
    opt = inject(schedule, weight_decay=0.5, mask=mask)
    assert _decayed(opt, _PARAMS) == mask(_PARAMS)

    zeros = jax.tree.map(jnp.zeros_like, _PARAMS)
    direct = adamaxw.adamaxw(schedule, b1=np.float32(0.9), weight_decay=0.5, mask=mask)

    def run(opt):
        def step(carry, _):
            params, state = carry
            updates, state = opt.update(zeros, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (_PARAMS, opt.init(_PARAMS)), length=5)[0][0]

    with jax.numpy_dtype_promotion("standard"):
        pairs = zip(jax.tree.leaves(run(opt)), jax.tree.leaves(run(direct)), strict=True)
        assert all(np.allclose(a, b, rtol=1e-6) for a, b in pairs)


def test_in_inject_hyperparams_the_state_goes_through_transformations():
    """The mask in `state.hyperparams` has no leaves: the state is one of arrays, as before."""
    opt = optax.inject_hyperparams(adamaxw.adamaxw)(0.1, mask=masks.matrices)
    state = opt.init(_PARAMS)
    assert state.hyperparams["mask"](_PARAMS) == masks.matrices(_PARAMS)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    leaves, treedef = jax.tree.flatten(state)
    again = treedef.unflatten(leaves)
    assert jax.tree.structure(again) == treedef == jax.tree.structure(opt.init(_PARAMS))
    assert jax.tree.structure(jax.eval_shape(opt.init, _PARAMS)) == treedef


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("mask", [masks.matrices, masks.matching("^blocks/.*w$")])
def test_in_optax_masked(mask):
    """A mask chooses for Optax's wrappers, too, which show it gradients."""
    opt = optax.chain(
        optax.masked(adamaxw.adamaxw(0.1, weight_decay=0.5), mask),
        optax.masked(adamaxw.adamax(0.1), ~mask),
    )
    assert _decayed(opt, _PARAMS) == mask(_PARAMS)
    assert _decayed(optax.adamaxw(0.1, weight_decay=0.5, mask=mask), _PARAMS) == mask(_PARAMS)
    labels = jax.tree.map(str, mask(_PARAMS))
    parts = {"True": adamaxw.adamaxw(0.1, weight_decay=0.5), "False": adamaxw.adamax(0.1)}
    assert _decayed(optax.partition(parts, labels), _PARAMS) == mask(_PARAMS)


class _Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(4, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(2, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


_NNX_MASKS = {
    "matrices": masks.matrices,
    "paths": ~masks.matching("^norm/scale$|bias$"),
    "combined": masks.matrices & ~masks.matching("^embed/embedding$"),
    "function": lambda params: jax.tree.map(lambda p: p.ndim >= 2, params),
    "function, combined": masks.matrices & (lambda ps: jax.tree.map(lambda p: p.ndim >= 2, ps)),
}


def _nnx_decayed(opt, model):
    state = nnx.Optimizer(model, opt, wrt=nnx.Param)
    before = [np.array(p) for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    nnx.jit(lambda model, state: state.update(model, zeros))(model, state)
    leaves = jax.tree_util.tree_leaves_with_path(as_pure(nnx.state(model, nnx.Param)))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): bool(np.any(p != old))
        for (path, p), old in zip(leaves, before, strict=True)
    }


@pytest.mark.parametrize("name", _NNX_MASKS)
@pytest.mark.parametrize("form", ["function", "tree of Variables", "tree", "masked", "injected"])
def test_flax_nnx(name, form):
    """As a function, as a tree made from `nnx.state` or from its pure form, and in wrappers."""
    mask = _NNX_MASKS[name]
    model = _Model(nnx.Rngs(0))
    # Biases start at 0, and would not be seen to decay.
    for block in model.blocks:
        block.bias[...] = jnp.ones(2)
    model.norm.bias[...] = jnp.ones(2)
    expected = {
        "embed/embedding": name != "combined",
        "blocks/0/kernel": True,
        "blocks/0/bias": False,
        "blocks/1/kernel": True,
        "blocks/1/bias": False,
        "norm/scale": False,
        "norm/bias": False,
    }
    params = nnx.state(model, nnx.Param)
    make = functools.partial(adamaxw.adamaxw, 0.1, weight_decay=0.5)
    if form == "function":
        opt = make(mask=mask)
    elif form == "tree of Variables":
        tree = mask(params)
        if name == "function":
            assert isinstance(tree["norm"]["scale"], nnx.Param)
        opt = make(mask=tree)
    elif form == "tree":
        opt = make(mask=mask(as_pure(params)))
    elif form == "masked":
        opt = optax.masked(make(), mask)
    else:
        static = () if isinstance(mask, masks.Mask) else ("mask",)
        inject = optax.inject_hyperparams(adamaxw.adamaxw, static_args=static)
        opt = inject(0.1, weight_decay=0.5, mask=mask)
    assert _nnx_decayed(opt, model) == expected


def test_equinox():
    """Paths of modules are those of their attributes; None has no path."""
    model = eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    assert _chosen(masks.matrices, params) == ["layers/0/weight", "layers/1/weight"]
    assert _chosen(masks.matching("0/"), params) == ["layers/0/bias", "layers/0/weight"]


def test_a_tree_without_leaves():
    """`optax.tree.map_params` makes one: there is nothing to match, and nothing wrong."""
    assert masks.matching("w")({}) == {}
    opt = adamaxw.adamaxw(0.1, mask=masks.matching("w$"))
    state = opt.init(_PARAMS)
    mapped = optax.tree.map_params(opt, lambda x: x + 1, state)
    assert np.all(mapped.mu["embed"]["w"] == 1)


@pytest.mark.parametrize(
    ("mask", "pattern"),
    [
        (masks.matching("kernel"), "kernel"),
        (masks.matching(["w", "kernel"]), "kernel"),
        (masks.matching(exclude="Embed"), "Embed"),
        (masks.matching("w", exclude=["embed", "norm"]), "norm"),
        (masks.matrices & ~masks.matching("bias$"), "bias$"),
    ],
)
def test_a_pattern_that_matches_nothing(mask, pattern):
    """An error at init that names the pattern and some of the paths there are."""
    with pytest.raises(ValueError, match=f"pattern {pattern!r}".replace("$", r"\$")) as error:
        adamaxw.adamaxw(0.1, mask=mask).init(_PARAMS)
    assert "blocks/0/b, blocks/0/scale" in str(error.value)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.matching("("), ValueError, r"include has '\(', .* no regular expression"),
        (lambda: masks.matching("w", exclude=["b", "["]), ValueError, r"exclude has '\['"),
        (lambda: masks.matching(3), TypeError, "include must be a string or .* got 3"),
        (lambda: masks.matching(["w", b"b"]), TypeError, "include must be .* got .*b'b'"),
        (lambda: masks.matching([]), ValueError, "include must have at least one pattern"),
        (lambda: masks.rank(-1), ValueError, "minimum must be at least 0, got -1"),
        (lambda: masks.rank(2.0), TypeError, "minimum must be an integer, got 2.0"),
        (lambda: masks.rank(True), TypeError, "minimum must be an integer, got True"),
        (lambda: masks.matrices and masks.rank(1), TypeError, "combine with &"),
        (lambda: not masks.matrices, TypeError, "combine with &"),
        (lambda: masks.matrices & {"w": True}, TypeError, "unsupported operand"),
        (lambda: True | masks.matrices, TypeError, "unsupported operand"),
    ],
)
def test_bad_masks_are_refused(make, error, message):
    """When they are made, with the argument and the value."""
    with pytest.raises(error, match=message):
        make()


def test_a_combined_function_that_is_no_mask():
    """What it returns is held against params, with the path."""
    mask = masks.matrices & (lambda params: {"embed": 1, "blocks": True})
    with pytest.raises(TypeError, match=r"mask\['embed'\] must be one boolean"):
        adamaxw.adamaxw(0.1, mask=mask).init(_PARAMS)


def test_equal_masks():
    """Equal and hashable by what they choose, so that jit compiles once for both."""
    pairs = [
        (masks.matrices, masks.rank(2)),
        (masks.matching("w", exclude="b"), masks.matching(["w"], exclude=["b"])),
        (masks.rank(1) & ~masks.matching("w"), masks.rank(1) & ~masks.matching("w")),
        (masks.rank(1) | masks.matching("w"), masks.rank(1) | masks.matching("w")),
    ]
    for a, b in pairs:
        assert a == b
        assert hash(a) == hash(b)
    assert masks.rank(1) != masks.rank(2)
    assert masks.rank(1) & masks.rank(2) != masks.rank(1) | masks.rank(2)


@pytest.mark.parametrize(
    "text",
    [
        "masks.rank(2)",
        "masks.matching('a')",
        "masks.matching(include=['a', 'b'])",
        "masks.matching(include=['a'], exclude=['b'])",
        "(masks.rank(1) | masks.matching('a')) & ~masks.matching('b')",
        "~(masks.rank(1) & masks.matching('a'))",
        "~~masks.rank(1) | masks.rank(2) & masks.rank(3)",
        "masks.rank(1) & (masks.rank(2) & masks.rank(3))",
        "masks.rank(1) | (masks.rank(2) | masks.rank(3))",
    ],
)
def test_the_repr_makes_an_equal_mask(text):
    """It reads as one would write it."""
    mask = eval(text)
    assert eval(repr(mask)) == mask
    assert repr(eval(repr(mask))) == repr(mask)


def test_describe():
    """Path, shape, dtype, number and decay of each leaf, and totals."""
    params = {
        "w": jnp.ones((20, 100), jnp.bfloat16),
        "b": jnp.ones(3),
        "steps": jnp.zeros(5, jnp.int32),
        "empty": jnp.zeros((0, 4)),
    }
    table = masks.describe(params, masks.matching("w|steps|empty"))
    assert str(table).splitlines() == [
        "path            shape      dtype     parameters  decays",
        "b               (3,)       float32            3  no",
        "empty           (0, 4)     float32            0  yes",
        "steps           (5,)       int32              5  no",
        "w               (20, 100)  bfloat16       2,000  yes",
        "decays                                    2,000",
        "does not decay                                8",
        "total                                     2,008",
    ]
    everything = masks.describe(jax.eval_shape(lambda: params))
    assert "does not decay                                5" in str(everything)
    with pytest.raises(ValueError, match="mask and params differ in structure"):
        masks.describe(params, {"w": True})
    with pytest.raises(TypeError, match=r"arrays of numbers, got 'text' at 'f/0'"):
        masks.describe({"f": ["text"]})


def test_describe_with_rich():
    """Rich prints the same cells with rules, whatever brackets are in the paths."""
    table = masks.describe({"[red]": jnp.ones((2, 2))}, masks.matrices)
    console = rich.console.Console(width=80, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "[red]" in text
    assert "(2, 2)" in text
    assert "does not decay" in text


def test_describe_of_an_nnx_state():
    """Variables are leaves: the same table for params with and without them."""
    params = nnx.state(_Model(nnx.Rngs(0)), nnx.Param)
    table = masks.describe(params, masks.matrices)
    assert str(table) == str(masks.describe(as_pure(params), masks.matrices))
    assert "blocks/0/kernel" in str(table)


def test_a_variable_that_holds_a_tree():
    """Its leaves are leaves of params, for every kind of mask."""

    class Model(nnx.Module):
        def __init__(self):
            self.both = nnx.Param({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})

    params = nnx.state(Model(), nnx.Param)
    assert masks.matrices(params)["both"] == {"w": True, "b": False}
    assert "both/w" in str(masks.describe(params, masks.matching("w$")))
    for mask in (masks.matrices, lambda ps: jax.tree.map(lambda p: p.ndim >= 2, ps)):
        opt = adamaxw.adamaxw(0.1, weight_decay=0.5, mask=mask)
        assert _nnx_decayed(opt, Model()) == {"both/w": True, "both/b": False}
