"""In Keras: `compile`, `fit` and saving, beside the optimizers of Keras and the transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from equality import assert_equal
from gradients import gradients
from modes import apply_updates

import adamaxw.keras
from adamaxw.keras import Adamaxw

pytestmark = [
    pytest.mark.usefixtures("standard_promotion", "compile_fast"),
    # Variables of Keras, under NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

_X = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
_Y = np.sin(_X.sum(axis=1, keepdims=True))
_FORMATS = [(None, "nearest"), ("bfloat16", "stochastic"), ("uint8", "exact")]


def _model(policy="float32") -> Any:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)]
        return keras.Sequential([keras.layers.Input((4,)), *layers])
    finally:
        keras.config.set_dtype_policy("float32")


def _fit(model, optimizer=None, epochs=2, callbacks=(), **compile_options):
    """The losses of some epochs of two batches, always in the same order."""
    if optimizer is not None:
        model.compile(optimizer, loss="mse", **compile_options)
    history = model.fit(
        _X, _Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    return history.history["loss"]


def _values(variables):
    """Their values, on the host: those of Keras are donated in the next step."""
    return [np.asarray(v.value) for v in variables]


@pytest.mark.parametrize("param_rounding", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("moment_dtype", [None, "bfloat16", "uint8"])
def test_steps_are_those_of_the_transformation(moment_dtype, param_rounding):
    """On the same list of arrays, bit for bit; leaves without a gradient stay."""
    formats = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
    start = [jnp.ones((4, 3), jnp.bfloat16), jnp.ones(3), jnp.ones(2, jnp.bfloat16)]
    variables = [keras.Variable(p, name=f"v{i}") for i, p in enumerate(start)]
    optimizer = Adamaxw(1e-2, weight_decay=0.1, **formats)
    optimizer.exclude_from_weight_decay(var_names=["1"])

    opt = adamaxw.adamaxw(1e-2, weight_decay=0.1, mask=[True, False, True], **formats)
    params, state = start, opt.init(start)
    drawn = [gradients("normal", 3, p.shape, seed) for seed, p in enumerate(start)]
    for i in range(3):
        grads = [jnp.asarray(g[i], p.dtype) for g, p in zip(drawn, start, strict=True)]
        if i == 1 and moment_dtype is None:
            grads[2] = None
            with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['v2'\]"):
                optimizer.apply(grads, variables)
        else:
            optimizer.apply(grads, variables)
        updates, state = opt.update(grads, state, params)
        params = [
            p if u is None else apply_updates(p, u) for p, u in zip(params, updates, strict=True)
        ]
    assert_equal([v.value for v in variables], params)
    assert_equal(optimizer.state, state)
    leaves = jax.tree.leaves(state)
    assert [v.dtype for v in optimizer.variables[2:]] == [leaf.dtype.name for leaf in leaves]
    paths = [v.path for v in optimizer.variables]
    assert len(set(paths)) == len(paths)
    assert {"adamaxw/count", "adamaxw/v1_mu", "adamaxw/v2_nu"} < set(paths)


@pytest.mark.parametrize(
    ("options", "compile_options"),
    [
        ({}, {}),
        ({}, {"run_eagerly": True}),
        ({"weight_decay": None, "clipvalue": 0.01, "learning_rate": lambda: 1e-2}, {}),
        ({"clipnorm": 0.1, "gradient_accumulation_steps": 2, "loss_scale_factor": 128.0}, {}),
        (
            {
                "learning_rate": keras.optimizers.schedules.CosineDecay(1e-2, 10),
                "global_clipnorm": 0.1,
                "use_ema": True,
                "ema_momentum": 0.9,
                "ema_overwrite_frequency": 3,
            },
            {},
        ),
    ],
    ids=lambda options: ", ".join(options),
)
def test_losses_are_those_of_the_adamax_of_keras(options, compile_options):
    """It adds eps elsewhere, but decays the same; every option of the base class takes effect."""
    models, losses = [], []
    for optimizer_class in (Adamaxw, keras.optimizers.Adamax):
        arguments = {"learning_rate": 1e-2, "weight_decay": 0.1, "epsilon": 1e-12} | options
        optimizer = optimizer_class(**arguments)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        models.append(_model())
        epochs = 1 if compile_options else 2
        losses.append(_fit(models[-1], optimizer, epochs, **compile_options))
    np.testing.assert_allclose(*losses, rtol=2e-6)
    for a, b in zip(*map(_values, (models[0].variables, models[1].variables)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    optimizer = models[0].optimizer
    assert int(optimizer.state.count) == int(optimizer.iterations)


@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _FORMATS)
def test_training_goes_on_from_saved_weights_and_models(moment_dtype, param_rounding, tmp_path):
    """Bit for bit, with the state, which decay, and the learning rate."""

    def optimizer():
        formats = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
        return Adamaxw(
            keras.optimizers.schedules.CosineDecay(1e-2, 99), weight_decay=0.3, **formats
        )

    policy = "float32" if moment_dtype is None else "bfloat16"
    model, other = _model(policy), _model(policy)
    chosen = optimizer()
    chosen.exclude_from_weight_decay(var_list=[model.layers[1].kernel], var_names=["bias"])
    _fit(model, chosen, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")

    model.save_weights(tmp_path / "model.weights.h5")
    other.compile(optimizer(), loss="mse")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    for copy in (loaded, other):
        assert_equal(_values(copy.variables), _values(model.variables))
        assert_equal(_values(copy.optimizer.variables), _values(model.optimizer.variables))
    assert type(loaded.optimizer) is Adamaxw
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert model.optimizer.get_config()["excluded"] == ["bias", 2]

    assert _fit(loaded) == _fit(model)
    assert_equal(_values(loaded.variables), _values(model.variables))
    assert_equal(_values(loaded.optimizer.variables), _values(model.optimizer.variables))


def test_which_decay_is_part_of_the_config():
    """Before and after `build`; a lone string is one name, and a new choice replaces the old."""
    optimizer = Adamaxw(1.0, weight_decay=0.5, scale_decay_by_lr=False, moment_dtype=jnp.uint8)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    optimizer.exclude_from_weight_decay(var_names="bias")
    for _ in range(2):
        optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        variables = [keras.Variable([2.0], name=name) for name in ("kernel", "bias")]
        optimizer.apply([jnp.zeros(1), jnp.zeros(1)], variables)
        assert [float(v.value[0]) for v in variables] == [1.0, 2.0]
        assert optimizer.moment_dtype == "uint8"
    with pytest.raises(ValueError, match="before build"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


def test_names_that_do_not_decay_hold_for_another_model():
    """A config made anew from that of a built optimizer, as after freezing a layer."""
    optimizer = Adamaxw(1.0, weight_decay=0.5, scale_decay_by_lr=False, excluded="bias")
    for names in (("kernel", "bias"), ("bias", "kernel", "bias")):
        optimizer = Adamaxw.from_config(optimizer.get_config())
        variables = [keras.Variable([2.0], name=name) for name in names]
        optimizer.apply([jnp.zeros(1)] * len(names), variables)
        assert [v.value[0] for v in variables] == [1.0 if n == "kernel" else 2.0 for n in names]


def test_layers_that_do_not_decay_by_path():
    """Keras itself knows only the last part of a path, which is the same in all layers."""
    layers = [keras.layers.Dense(1, name=name) for name in ("encoder", "head")]
    model = keras.Sequential([keras.layers.Input((4,)), *layers])
    before = _values(model.trainable_variables)
    optimizer = Adamaxw(0.0, weight_decay=0.5, scale_decay_by_lr=False, excluded=["encoder/"])
    optimizer.apply([jnp.zeros(v.shape) for v in before], model.trainable_variables)
    factors = [1.0, 1.0, 0.5, 0.5]
    assert_equal(
        _values(model.trainable_variables),
        [factor * v for factor, v in zip(factors, before, strict=True)],
    )


def test_indices_and_patterns_that_do_not_decay():
    """Each pattern is one of its own, also with flags; variables that do not train do not count."""
    names = ("kernel", "bias", "gamma", "beta")
    variables = [keras.Variable([2.0], name=name) for name in names]
    optimizer = Adamaxw(1.0, weight_decay=0.5, scale_decay_by_lr=False)
    optimizer.exclude_from_weight_decay([0, keras.Variable([1.0])], ["gamma", "(?i)BIAS"])
    optimizer.apply([jnp.zeros(1)] * 4, variables)
    assert [float(v.value[0]) for v in variables] == [2.0, 2.0, 2.0, 1.0]
    assert optimizer.get_config()["excluded"] == ["gamma", "(?i)BIAS", 0]


def test_learning_rates_of_callbacks_and_by_hand():
    """The one that is set is the one that the next step has."""
    model = _model()
    _fit(model, Adamaxw(1e-2, weight_decay=0.1), epochs=1)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)
    _fit(model, epochs=2, callbacks=[halve])
    assert float(model.optimizer.learning_rate) == pytest.approx(2.5e-3)
    plateau = keras.callbacks.ReduceLROnPlateau("loss", patience=0, min_delta=1e9, factor=0.1)
    _fit(model, epochs=3, callbacks=[plateau])
    assert float(model.optimizer.learning_rate) == pytest.approx(2.5e-5)
    model.optimizer.learning_rate = 0.0
    before = _values(model.trainable_variables)
    _fit(model)
    assert_equal(_values(model.trainable_variables), before)


def test_frozen_layers_have_no_state():
    model = _model()
    model.layers[0].trainable = False
    before = _values(model.layers[0].variables)
    _fit(model, Adamaxw(1e-2, weight_decay=0.5))
    assert_equal(_values(model.layers[0].variables), before)
    assert len(model.optimizer.state.mu) == 2


def test_variables_that_their_gradient_overwrites():
    """As the scales of float8 are: the optimizer does not see them."""
    scale, weight = keras.Variable([1.0], name="scale"), keras.Variable([1.0], name="weight")
    scale.overwrite_with_gradient = True
    optimizer = Adamaxw(0.1, weight_decay=0.0)
    optimizer.apply([jnp.asarray([7.0]), jnp.asarray([7.0])], [scale, weight])
    np.testing.assert_allclose([scale.value[0], weight.value[0]], [7.0, 0.9], rtol=1e-6)
    assert float(optimizer.state.mu[0][0]) == 0


@pytest.mark.parametrize(("jit_compile", "epochs"), [(True, 4), (False, 0)])
def test_mixed_float16_scales_losses(jit_compile, epochs):
    """A step whose gradients are not finite leaves parameters and state as they were."""
    model = _model("mixed_float16")
    model.compile(Adamaxw(1e-2), loss="mse", jit_compile=jit_compile)
    model.optimizer.build(model.trainable_variables)
    if epochs:
        losses = _fit(model, epochs=epochs)
        assert losses[-1] < losses[0]
    inner = model.optimizer.inner_optimizer
    before = _values([*model.trainable_variables, *inner.variables])
    model.train_on_batch(_X * 1e30, _Y)
    assert_equal(_values([*model.trainable_variables, *inner.variables]), before)
    assert int(inner.state.count) == int(inner.iterations)
    assert bool(inner.state.count) == bool(epochs)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_policies_with_bfloat16(policy):
    """Variables are bfloat16 with the second alone; "exact" has their float32 weights."""
    model = _model(policy)
    variables = model.trainable_variables
    optimizer = Adamaxw(1e-2, param_rounding="exact")
    optimizer.apply([jnp.ones(v.shape, v.dtype) for v in variables], variables)
    values = [v.value for v in variables]
    assert values[0].dtype == ("bfloat16" if policy == "bfloat16" else "float32")
    master = adamaxw.moments.master_params(values, optimizer.state)
    assert master[0].dtype == jnp.float32
    assert_equal(master[0].astype(values[0].dtype), values[0])


@pytest.mark.parametrize(
    ("options", "repeats"),
    [
        ({"gradient_accumulation_steps": 2}, 2),
        ({"use_ema": True, "ema_momentum": 0.0, "ema_overwrite_frequency": 1}, 1),
        ({"clipvalue": 1e9, "loss_scale_factor": 1.0}, 1),
    ],
    ids=lambda options: next(iter(options)) if isinstance(options, dict) else "",
)
@pytest.mark.parametrize(("moment_dtype", "param_rounding"), _FORMATS[1:])
def test_options_without_effect_on_bfloat16(moment_dtype, param_rounding, options, repeats):
    """They, and a constraint that holds, change no bit of a variable or of the state."""
    formats = {"moment_dtype": moment_dtype, "param_rounding": param_rounding}
    runs = []
    for arguments, number in (({}, 1), (options, repeats)):
        variable = keras.Variable(jnp.ones((4, 3), jnp.bfloat16))
        variable.constraint = keras.constraints.NonNeg() if arguments else None
        optimizer = Adamaxw(1e-2, **formats, **arguments)
        for g in gradients("normal", 3, (4, 3)):
            for _ in range(number):
                optimizer.apply([jnp.asarray(g, jnp.bfloat16)], [variable])
        runs.append((variable.value, optimizer.state))
    assert_equal(*runs)


def test_data_parallel():
    """Eight devices take the steps of one, up to the order of sums; the state is replicated."""
    losses = [_fit(_model(), Adamaxw(1e-2, moment_dtype="uint8"))]
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        model = _model()
        losses.append(_fit(model, Adamaxw(1e-2, moment_dtype="uint8")))
    finally:
        keras.distribution.set_distribution(None)
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(model.optimizer.state))
    assert len(model.optimizer.state.mu[0].sharding.device_set) == 8


def test_model_parallel():
    """The leaves of the state lie as their variables do."""
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = (None, "model")
    distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)
    try:
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(8)])
        optimizer = Adamaxw(1e-2, moment_dtype="uint8")
        model.compile(optimizer, loss="mse")
        optimizer.build(model.trainable_variables)
        for epochs in (0, 1):
            model.fit(_X, np.repeat(_Y, 8, axis=1), epochs=epochs, batch_size=16, verbose=0)
            for leaves in (optimizer.state.mu, optimizer.state.nu):
                for leaf, variable in zip(leaves, model.trainable_variables, strict=True):
                    assert leaf.sharding == variable.value.sharding
        assert model.layers[0].kernel.value.sharding.spec == jax.P(None, "model")
    finally:
        keras.distribution.set_distribution(None)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "b1 must satisfy", {"beta_1": 1.0}),
        (ValueError, "learning_rate must satisfy", {"learning_rate": -1.0}),
        (ValueError, "moment_dtype must be", {"moment_dtype": "int8"}),
        (ValueError, "param_rounding must be", {"param_rounding": "up"}),
        (TypeError, "scale_decay_by_lr must be a bool", {"scale_decay_by_lr": 1}),
        (TypeError, "real number", {"weight_decay": keras.optimizers.schedules.CosineDecay(1, 2)}),
        (ValueError, "not recognized: {'clip_norm'", {"clip_norm": 1.0}),
    ],
)
def test_wrong_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        Adamaxw(**arguments)


def test_what_is_refused_later(monkeypatch):
    """A rounding that does not fit, a state that is not there, another backend."""
    optimizer = Adamaxw(param_rounding="exact")
    with pytest.raises(TypeError, match="float16"):
        optimizer.build([keras.Variable([1.0], dtype="float16")])
    with pytest.raises(ValueError, match="before it is built"):
        _ = optimizer.state
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match=r"KERAS_BACKEND=jax.*now 'torch'"):
        Adamaxw()


def test_compile_refuses_the_transformation():
    """Which is why there is a class for Keras."""
    for make in (optax.adamaxw, adamaxw.adamaxw):
        with pytest.raises(ValueError, match="Could not interpret optimizer identifier"):
            _model().compile(optimizer=make(1e-3))
