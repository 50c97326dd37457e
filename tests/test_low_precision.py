"""Moments in few bits and bfloat16 parameters: in wrappers, on meshes, saved, and in training."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equality import (
    assert_equal,
    assert_equal_across_meshes,
    assert_equal_but_for_last_bits,
    types_of,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from modes import apply_updates

import adamaxw

_MOMENTS = (None, "bfloat16", "uint8")
_ROUNDINGS = ("nearest", "stochastic", "exact")
_HYPER = {"learning_rate": 1e-2, "weight_decay": 0.1}

each_format = pytest.mark.parametrize("moment_dtype", _MOMENTS)
each_rounding = pytest.mark.parametrize("param_rounding", _ROUNDINGS)


in_wrappers = pytest.mark.usefixtures("standard_promotion", "compile_fast")


def _make(moment_dtype, param_rounding, **hyperparameters):
    return adamaxw.adamaxw(
        **(_HYPER | hyperparameters), moment_dtype=moment_dtype, param_rounding=param_rounding
    )


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _random(seed, dtype, shapes):
    """A tree of arrays; not on any grid, so that every rounding has something to do."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in shapes.items()}


_SHAPES = {"s": (), "w": (3, 4)}
_PARAMS = _random(0, "bfloat16", _SHAPES)
# Wrappers that branch take long to compile, for each leaf.
_LEAF = {"w": _PARAMS["w"]}
_LEAF_SHAPES = {"w": (3, 4)}


def _gradients(n, dtype, shapes=_SHAPES):
    return [_random(100 + i, dtype, shapes) for i in range(n)]


def _dtypes(tree):
    return jax.tree.map(lambda x: str(x.dtype), tree)


def _eager_stepper(opt):
    def step(params, state, grads):
        updates, state = opt.update(grads, state, params)
        return apply_updates(params, updates), state

    return step


def _stepper(opt):
    """A compiled step, with a cache of its own."""
    return jax.jit(_eager_stepper(opt))


def _run(step, params, state, gradients):
    """The params and state after a step on each of the gradients; types stay."""
    types = types_of((params, state))
    for grads in gradients:
        params, state = step(params, state, grads)
        assert types_of((params, state)) == types
    return params, state


@functools.cache
def _alone(moment_dtype, param_rounding, dtype="bfloat16"):
    """Four steps of the optimizer without any wrapper."""
    opt = _make(moment_dtype, param_rounding)
    return _run(_stepper(opt), _PARAMS, opt.init(_PARAMS), _gradients(4, dtype))


# Wrappers ---------------------------------------------------------------------------------------

_BRANCHING = {
    "apply_if_finite": lambda opt: optax.apply_if_finite(opt, 2),
    "conditionally_mask": lambda opt: optax.conditionally_mask(opt, lambda step: step % 3 != 1),
    "MultiSteps": lambda opt: optax.MultiSteps(opt, 2),
    "MultiSteps, skip_not_finite": lambda opt: optax.MultiSteps(
        opt, 2, should_skip_update_fn=optax.skip_not_finite
    ),
}
# They choose between the updates and something in the dtype of the gradients. "exact" gives float32
# updates, so that they need float32 gradients. MultiSteps asks for the types of the updates.
_NEED_GRADIENTS_LIKE_UPDATES = ("apply_if_finite", "conditionally_mask")
# These leave out a step on gradients that are not finite.
_SKIPPING = ("apply_if_finite", "MultiSteps, skip_not_finite")


def _skip_old_multi_steps(opt, mixed):
    is_old = isinstance(opt, optax.MultiSteps) and not hasattr(opt, "_accumulator_dtype")
    if is_old and mixed:
        pytest.skip("before Optax 0.2.8 MultiSteps itself fails where the dtypes differ")


def _is_tested(wrapper, param_rounding, grad_dtype):
    is_bfloat16 = grad_dtype == "bfloat16"
    if wrapper in _NEED_GRADIENTS_LIKE_UPDATES and param_rounding == "exact":
        return not is_bfloat16  # refused: see test_wrappers_that_refuse_float32_updates
    # What is left out branches as one of the others does, and takes long to compile.
    return is_bfloat16 or wrapper in _SKIPPING


@in_wrappers
@pytest.mark.parametrize(
    ("wrapper", "param_rounding", "grad_dtype", "moment_dtype"),
    [
        (*combination, moment_dtype)
        for combination in itertools.product(_BRANCHING, _ROUNDINGS, ["bfloat16", "float32"])
        if _is_tested(*combination)
        for moment_dtype in (_MOMENTS if combination[1] == "stochastic" else ["uint8"])
    ],
)
def test_wrappers_that_branch(wrapper, moment_dtype, param_rounding, grad_dtype):
    """Types stay, and a step on NaN that the wrapper skips leaves no trace in params and state."""
    opt = _BRANCHING[wrapper](_make(moment_dtype, param_rounding))
    _skip_old_multi_steps(opt, grad_dtype == "float32" or param_rounding == "exact")
    step, state = _stepper(opt), opt.init(_LEAF)
    gradients = _gradients(4, grad_dtype, _LEAF_SHAPES)
    clean = _run(step, _LEAF, state, gradients)
    assert not np.array_equal(clean[0]["w"], _LEAF["w"])
    if wrapper in _SKIPPING:
        bad = jax.tree.map(lambda g: g.at[0, :1].set(jnp.nan), gradients[0])
        skipping = [*gradients[:3], bad, gradients[3]]
        params, state = _run(step, _LEAF, state, skipping)
        assert_equal(params, clean[0])
        inner = "inner_state" if wrapper == "apply_if_finite" else "inner_opt_state"
        assert_equal(getattr(state, inner), getattr(clean[1], inner))
    assert step._cache_size() == 1


@in_wrappers
@each_format
@pytest.mark.parametrize("wrapper", _NEED_GRADIENTS_LIKE_UPDATES)
def test_wrappers_that_refuse_float32_updates(wrapper, moment_dtype):
    """With "exact" they take no bfloat16 gradients; cast to float32 they give the same run."""
    opt = _BRANCHING[wrapper](_make(moment_dtype, "exact"))
    state = opt.init(_LEAF)
    (grads,) = _gradients(1, "bfloat16", _LEAF_SHAPES)
    with pytest.raises(TypeError, match=r"(?s)bfloat16.*float32|float32.*bfloat16"):
        jax.eval_shape(opt.update, grads, state, _LEAF)
    updates, new = jax.jit(opt.update)(_cast(grads, jnp.float32), state, _LEAF)
    assert types_of(new) == types_of(state)
    # What the optimizer alone makes of them as they are.
    alone = _make(moment_dtype, "exact")
    expected, inner = jax.jit(alone.update)(grads, alone.init(_LEAF), _LEAF)
    assert_equal((updates, new.inner_state), (expected, inner))
    assert _dtypes(optax.apply_updates(_LEAF, updates)) == _dtypes(_LEAF)


@in_wrappers
@each_rounding
@each_format
def test_multi_steps_is_one_step_on_the_mean(moment_dtype, param_rounding):
    """Two half batches in float32 give the step of the whole batch: params and inner state."""
    inner = _make(moment_dtype, param_rounding)
    opt = optax.MultiSteps(inner, 2)
    _skip_old_multi_steps(opt, mixed=True)
    # Multiples of 1/256, so that sums and means are exact in any order.
    halves = [
        jax.tree.map(lambda g: jnp.round(g * 256) / 256, grads)
        for grads in _gradients(6, "float32", _LEAF_SHAPES)
    ]
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(halves[::2], halves[1::2], strict=True)
    ]
    params, state = _run(_stepper(opt), _LEAF, opt.init(_LEAF), halves)
    expected = _run(_stepper(inner), _LEAF, inner.init(_LEAF), means)
    assert_equal_but_for_last_bits((params, state.inner_opt_state), expected)


def _ours(state):
    """The AdamaxStates inside the state of a wrapper."""

    def is_ours(node):
        return isinstance(node, adamaxw.AdamaxState)

    return [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]


@in_wrappers
@each_rounding
@each_format
def test_chain_after_clipping(moment_dtype, param_rounding):
    """In a chain it is given the clipped gradients, and is found and changed by name."""
    alone = _make(moment_dtype, param_rounding)
    clip = optax.clip_by_global_norm(0.5)
    opt = optax.chain(clip, alone)
    gradients = _gradients(4, "float32")
    clipped = [clip.update(g, clip.init(_PARAMS))[0] for g in gradients]
    assert all(optax.tree.norm(g) < 0.501 for g in clipped)
    params, state = _run(_stepper(opt), _PARAMS, opt.init(_PARAMS), gradients)
    expected, inner = _run(_stepper(alone), _PARAMS, alone.init(_PARAMS), clipped)
    assert_equal_but_for_last_bits((params, state[1]), (expected, inner))

    scale = optax.tree.get(state, "nu_scale")
    if moment_dtype is None:
        assert scale is None
    else:
        assert (scale.dtype, scale.shape) == (jnp.float32, ())
        state = optax.tree.set(state, nu_scale=jnp.float32(0.75))
        assert state[1].nu_scale == 0.75
    residual = optax.tree.get(state, "residual")
    expected = jax.tree.map(lambda _: "int16", _PARAMS) if param_rounding == "exact" else None
    assert (None if residual is None else _dtypes(residual)) == expected


@in_wrappers
@each_rounding
@each_format
def test_masked_is_the_run_of_the_rest(moment_dtype, param_rounding):
    """Beside masked leaves, the others train as if they were alone."""
    inner = _make(moment_dtype, param_rounding)
    opt = optax.chain(
        optax.masked(inner, {"s": False, "w": True}),
        optax.masked(optax.set_to_zero(), {"s": True, "w": False}),
    )
    gradients = _gradients(4, "bfloat16")
    params, state = _run(_stepper(opt), _PARAMS, opt.init(_PARAMS), gradients)
    only = {"w": _PARAMS["w"]}
    alone = _run(_stepper(inner), only, inner.init(only), [{"w": g["w"]} for g in gradients])
    assert_equal(params["s"], _PARAMS["s"])
    assert_equal(params["w"], alone[0]["w"])
    (found,) = _ours(state)
    assert_equal(jax.tree.leaves(found), jax.tree.leaves(alone[1]))


@in_wrappers
@each_rounding
def test_partition_into_formats(param_rounding):
    """A format for each group; each trains as if it were alone."""
    groups = {"s": _make(None, param_rounding), "w": _make("uint8", param_rounding)}
    opt = optax.partition(groups, {"s": "s", "w": "w"})
    gradients = _gradients(4, "bfloat16")
    params, state = _run(_stepper(opt), _PARAMS, opt.init(_PARAMS), gradients)
    for name, inner in groups.items():
        only = {name: _PARAMS[name]}
        alone = _run(_stepper(inner), only, inner.init(only), [{name: g[name]} for g in gradients])
        assert_equal(params[name], alone[0][name])
        (found,) = _ours(state.inner_states[name])
        assert_equal(jax.tree.leaves(found), jax.tree.leaves(alone[1]))


@in_wrappers
@each_rounding
@each_format
def test_inject_hyperparams(moment_dtype, param_rounding):
    """The names of format and rounding pass through; the run is that with arrays."""
    opt = optax.inject_hyperparams(adamaxw.adamaxw, hyperparam_dtype=jnp.float32)(
        **_HYPER, moment_dtype=moment_dtype, param_rounding=param_rounding
    )
    state = opt.init(_PARAMS)
    assert set(state.hyperparams) == {"learning_rate", "b1", "b2", "eps", "weight_decay"}
    gradients = _gradients(4, "bfloat16")
    params, state = _run(_stepper(opt), _PARAMS, state, gradients)
    expected = _alone(moment_dtype, param_rounding)
    assert types_of((params, state.inner_state)) == types_of(expected)
    assert_equal_but_for_last_bits((params, state.inner_state), expected)


@in_wrappers
@each_rounding
def test_flatten(param_rounding):
    """As one vector: the state is one of that vector, and params keep dtype and shapes."""
    opt = optax.flatten(_make("uint8", param_rounding))
    state = opt.init(_PARAMS)
    assert [x.shape for x in jax.tree.leaves(state.mu)] == [(13,)]
    params, _ = _run(_stepper(opt), _PARAMS, state, _gradients(4, "bfloat16"))
    vector = jnp.concatenate([_PARAMS["s"].reshape(-1), _PARAMS["w"].reshape(-1)])
    vectors = [
        jnp.concatenate([g["s"].reshape(-1), g["w"].reshape(-1)]) for g in _gradients(4, "bfloat16")
    ]
    alone = _make("uint8", param_rounding)
    expected, _ = _run(_stepper(alone), vector, alone.init(vector), vectors)
    assert_equal(jnp.concatenate([params["s"].reshape(-1), params["w"].reshape(-1)]), expected)


@in_wrappers
@each_rounding
def test_lookahead(param_rounding):
    """Slow and fast parameters keep their dtype, though synchronising rewrites the fast ones."""
    opt = optax.lookahead(_make("uint8", param_rounding), 3, 0.5)
    params = optax.LookaheadParams.init_synced(_PARAMS)
    types = types_of(params)
    state = opt.init(params)
    state_types = types_of(state)

    @jax.jit
    def step(params, state):
        updates, state = opt.update(params.fast, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(7):
        params, state = step(params, state)
        assert types_of(params) == types
        assert types_of(state) == state_types
    for name in _PARAMS:
        start, end = (np.abs(p[name].astype(jnp.float32)) for p in (_PARAMS, params.slow))
        assert np.all(end < start)


@each_format
def test_map_params_names_every_copy(moment_dtype):
    """Optax finds moments and residuals beside params; count and scale are something else."""
    opt = _make(moment_dtype, "exact")
    names = {"s": "S", "w": "W"}
    named = optax.tree.map_params(
        opt,
        lambda _, name: name,
        opt.init(_PARAMS),
        names,
        transform_non_params=lambda _: "other",
    )
    scale = None if moment_dtype is None else "other"
    assert named == adamaxw.AdamaxState("other", names, names, scale, names, scale)


@each_format
def test_map_params_where_some_have_no_residual(moment_dtype):
    """Zeros of int8 stand there, so that a rest tree meets a leaf everywhere."""
    opt = _make(moment_dtype, "exact")
    params = {"s": _PARAMS["s"].astype(jnp.float32), "w": _PARAMS["w"]}
    state = opt.init(params)
    assert state.residual["s"].dtype == jnp.int8
    doubled = optax.tree.map_params(opt, lambda x: np.asarray(x).shape, state)
    assert doubled.mu == {"s": (), "w": (3, 4)}
    assert doubled.residual == {"s": (), "w": (3, 4)}

    names = {"s": "S", "w": "W"}
    named = optax.tree.map_params(
        opt,
        lambda x, name: (name, x is None),
        state,
        names,
        transform_non_params=lambda _: "other",
    )
    here = {"s": ("S", False), "w": ("W", False)}
    assert named.mu == named.nu == here
    assert named.residual == here
    assert named.count == "other"


# Meshes and compilation -------------------------------------------------------------------------

_MESH_SHAPES = {"w": (8, 8), "b": (4,), "s": (), "k": (3, 5, 7)}
_SPECS = {"w": P("data", "model"), "b": P("model"), "s": P()}


@functools.cache
def _single_device_run(moment_dtype, param_rounding, dtype):
    opt = _make(moment_dtype, param_rounding)
    params = _random(1, dtype, _MESH_SHAPES)
    gradients = _gradients(20, dtype, _MESH_SHAPES)
    return _run(_stepper(opt), params, opt.init(params), gradients)


@functools.cache
def _on_mesh(axis_type, dtype):
    """Params, gradients and the shardings of both."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    # JAX spells the sharding of what a program returns so, and takes another spelling of the same
    # sharding for a reason to compile again.
    nowhere = P(None, None, None) if axis_type == AxisType.Explicit else P()
    specs = _SPECS | {"k": nowhere}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    params = jax.device_put(_random(1, dtype, _MESH_SHAPES), shardings)
    gradients = jax.device_put(_gradients(20, dtype, _MESH_SHAPES), [shardings] * 20)
    return params, gradients, shardings


@pytest.mark.parametrize(
    ("param_rounding", "dtype", "axis_type"),
    [
        ("nearest", "float32", AxisType.Auto),
        # The state of the others is part of this one's.
        ("exact", "bfloat16", AxisType.Auto),
        ("exact", "bfloat16", AxisType.Explicit),
    ],
)
@each_format
def test_eight_devices_are_one(moment_dtype, param_rounding, dtype, axis_type):
    """On a mesh: the numbers of one device, the shardings of params, compiled once."""
    params, gradients, shardings = _on_mesh(axis_type, dtype)
    everywhere = NamedSharding(shardings["s"].mesh, P())
    opt = _make(moment_dtype, param_rounding)
    step = _stepper(opt)
    state = opt.init(params)
    trained, new = _run(step, params, state, gradients)
    assert step._cache_size() == 1
    for s in (state, new):
        for tree in (s.mu, s.nu, s.residual):
            for name, sharding in shardings.items() if tree is not None else ():
                assert tree[name].sharding.is_equivalent_to(sharding, tree[name].ndim), name
        for scalar in (s.count, s.nu_scale):
            assert scalar is None or scalar.sharding.is_equivalent_to(everywhere, 0)
    for name, sharding in shardings.items():
        assert trained[name].sharding.is_equivalent_to(sharding, trained[name].ndim), name
    assert_equal_across_meshes(
        (trained, new), _single_device_run(moment_dtype, param_rounding, dtype)
    )


@pytest.mark.parametrize("param_rounding", ["stochastic", "exact"])
@each_format
def test_eager_and_compiled(moment_dtype, param_rounding):
    """Without jit the run has the same types and codes."""
    opt = _make(moment_dtype, param_rounding)
    params = _random(2, "bfloat16", {"k": (3, 5, 7)})
    gradients = _gradients(2, "bfloat16", {"k": (3, 5, 7)})
    compiled = _run(_stepper(opt), params, opt.init(params), gradients)
    eager = _run(_eager_stepper(opt), params, opt.init(params), gradients)
    assert types_of(eager) == types_of(compiled)
    assert_equal_but_for_last_bits(eager, compiled)


@each_rounding
@each_format
def test_saved_and_resumed(moment_dtype, param_rounding):
    """Params and state as NumPy arrays are all there is: the rest of the run is the same."""
    opt = _make(moment_dtype, param_rounding)
    step = _stepper(opt)
    gradients = _gradients(60, "bfloat16")
    halfway = _run(step, _PARAMS, opt.init(_PARAMS), gradients[:30])
    saved = jax.tree.map(np.asarray, halfway)
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(saved))
    through = _run(step, *halfway, gradients[30:])
    params, state = jax.tree.map(jnp.asarray, saved)
    assert isinstance(state, adamaxw.AdamaxState)
    assert_equal(_run(step, params, state, gradients[30:]), through)


# Memory -----------------------------------------------------------------------------------------

_STATE_BYTES = {None: 8, "bfloat16": 4, "uint8": 2}


def _n_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@each_rounding
@each_format
def test_bytes_of_state(moment_dtype, param_rounding, dtype):
    """8, 4 or 2 bytes a parameter, 2 more for the low bits of a bfloat16 one, and scalars."""
    params = jnp.ones((30, 40), dtype)
    state = _make(moment_dtype, param_rounding).init(params)
    has_residual = param_rounding == "exact" and dtype == "bfloat16"
    a_parameter = _STATE_BYTES[moment_dtype] + 2 * has_residual
    is_noisy = moment_dtype is not None or param_rounding == "stochastic"
    scalars = 4 + 4 * (moment_dtype is not None) + 4 * is_noisy
    assert _n_bytes(state) == a_parameter * params.size + scalars


# Temporary bytes a parameter of a step, as XLA on the CPU reports them.
_TEMPORARY = {None: 0.1, "uint8": 2.1, "bfloat16": 4.1}
_TEMPORARY_EXACT = {None: 4.2, "uint8": 6.2, "bfloat16": 8.2}


@pytest.mark.parametrize("grad_dtype", ["bfloat16", "float32"])
@each_rounding
@each_format
def test_memory_of_a_step(moment_dtype, param_rounding, grad_dtype):
    """Donated params and state are updated in place, beside copies of codes and master weights."""
    opt = _make(moment_dtype, param_rounding)
    params = jax.ShapeDtypeStruct((1000, 1000), jnp.bfloat16)
    grads = jax.ShapeDtypeStruct((1000, 1000), grad_dtype)
    state = jax.eval_shape(opt.init, params)
    step = jax.jit(_eager_stepper(opt), donate_argnums=(0, 1))
    memory = step.lower(params, state, grads).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not say what memory a program takes")
    bounds = _TEMPORARY_EXACT if param_rounding == "exact" else _TEMPORARY
    assert memory.temp_size_in_bytes / params.size < bounds[moment_dtype]
    # The scalars may be anywhere.
    assert memory.alias_size_in_bytes >= _n_bytes((params, state)) - 8


@each_format
def test_state_can_be_donated(moment_dtype):
    """No buffer occurs twice in params and state: all can be given away, and all are reused."""
    opt = _make(moment_dtype, "exact")
    params = _cast({"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}, jnp.bfloat16)
    grads = jax.tree.map(jnp.copy, params)
    step = jax.jit(_eager_stepper(opt), donate_argnums=(0, 1))
    state = opt.init(params)
    for _ in range(3):
        leaves = jax.tree.leaves((params, state))
        assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)
        params, state = step(params, state, grads)
        assert all(x.is_deleted() for x in leaves)


# Training ---------------------------------------------------------------------------------------

_RNG = np.random.default_rng(0)
_INPUTS = jnp.asarray(_RNG.normal(size=(128, 16)), jnp.float32)
# All weights begin at 1 and end between 3/4 and 5/4.
_TARGETS = _INPUTS @ jnp.asarray(_RNG.uniform(0.75, 1.25, 16), jnp.float32) + jnp.asarray(
    0.03 * _RNG.normal(size=128), jnp.float32
)


def _regression_loss(params):
    return jnp.mean((_INPUTS @ params.astype(jnp.float32) - _TARGETS) ** 2)


@functools.cache
def _regression(moment_dtype, param_rounding, dtype, learning_rate):
    """The loss before and after 500 steps of least squares; gradients in the dtype of params.

    The mean over 256 seeds, where anything is rounded at random: one may be off by a tenth.
    """
    opt = _make(moment_dtype, param_rounding, learning_rate=learning_rate, weight_decay=0.0)
    step = _eager_stepper(opt)

    @jax.jit
    @jax.vmap
    def train(seed):
        def body(carry, _):
            return step(*carry, jax.grad(_regression_loss)(carry[0])), None

        state = opt.init(params)
        if state.seed is not None:
            state = state._replace(seed=seed)
        (trained, _), _ = jax.lax.scan(body, (params, state), length=500)
        return trained

    params = jnp.ones(16, dtype)
    trained = train(jnp.arange(256, dtype=jnp.uint32))
    assert trained.dtype == dtype
    losses = [float(_regression_loss(x)) for x in trained]
    return float(_regression_loss(params)), float(np.mean(losses))


@pytest.mark.parametrize("param_rounding", ["stochastic", "exact"])
@each_format
def test_trains_to_the_loss_of_float32(moment_dtype, param_rounding):
    """In bfloat16 with small steps, the loss ends within a fifth of that in float32."""
    start, reference = _regression(None, "nearest", "float32", 1.5e-3)
    assert reference < start / 20
    _, loss = _regression(moment_dtype, param_rounding, "bfloat16", 1.5e-3)
    assert loss == pytest.approx(reference, rel=0.2)


@each_format
def test_nearest_loses_small_steps(moment_dtype):
    """Steps below half of the distance to the next bfloat16 are rounded away: nothing trains."""
    # Below 1 the next one is 2**-8 away, and a step is at most the learning rate.
    assert 1.5e-3 < 2**-9
    start, loss = _regression(moment_dtype, "nearest", "bfloat16", 1.5e-3)
    assert loss == start


@in_wrappers
@each_format
def test_equinox_keeps_bfloat16_with_stochastic(moment_dtype):
    """eqx.apply_updates adds without a cast, and bfloat16 gradients give bfloat16 updates."""
    opt = _make(moment_dtype, "stochastic")
    params, state = _PARAMS, opt.init(_PARAMS)
    update = jax.jit(opt.update)
    for grads in _gradients(4, "bfloat16"):
        updates, state = update(grads, state, params)
        params = eqx.apply_updates(params, updates)
        assert types_of(params) == types_of(_PARAMS)
    assert_equal((params, state), _alone(moment_dtype, "stochastic"))


@in_wrappers
@each_format
def test_equinox_makes_params_float32_with_exact(moment_dtype):
    """That is refused at the next update, which names what keeps the dtype."""
    opt = _make(moment_dtype, "exact")
    (grads,) = _gradients(1, "bfloat16")
    updates, state = jax.jit(opt.update)(grads, opt.init(_PARAMS), _PARAMS)
    params = eqx.apply_updates(_PARAMS, updates)
    assert set(jax.tree.leaves(_dtypes(params))) == {"float32"}
    with pytest.raises(TypeError, match=r"params\['s'\] came as float32.*optax\.apply_updates"):
        opt.update(grads, state, params)


@pytest.mark.parametrize("param_rounding", ["stochastic", "exact"])
def test_vmap_over_learning_rates(param_rounding):
    """Each lane is the run alone: the noise of a step does not depend on the other lanes."""
    rates = jnp.array([1e-3, 1e-2, 0.1], jnp.float32)
    target = jnp.linspace(-0.5, 2.0, 12).reshape(3, 4)

    def train(learning_rate):
        opt = _make("uint8", param_rounding, learning_rate=learning_rate)
        step = _eager_stepper(opt)

        def body(carry, _):
            return step(*carry, {"w": carry[0]["w"] - target.astype(jnp.bfloat16)}), None

        params = {"w": _PARAMS["w"]}
        return jax.lax.scan(body, (params, opt.init(params)), length=50)[0]

    many = jax.jit(jax.vmap(train))(rates)
    alone = jax.jit(train)
    for lane, rate in enumerate(rates):
        assert_equal_but_for_last_bits(jax.tree.map(lambda x, i=lane: x[i], many), alone(rate))
