"""In Keras: `compile`, `fit` and saving, beside the optimizers of Keras and the transformation."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from cases import MOMENTS, ROUNDINGS
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
_FORMATS: list[dict[str, Any]] = [
    {"moment_dtype": moments, "param_rounding": rounding}
    for moments, rounding in zip(MOMENTS, ROUNDINGS, strict=True)
]
_COSINE = keras.optimizers.schedules.CosineDecay(1e-2, 10)


def _model(policy="float32") -> Any:
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    try:
        layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1)]
        return keras.Sequential([keras.layers.Input((4,)), *layers])
    finally:
        keras.config.set_dtype_policy("float32")


def _fit(model, optimizer=None, epochs=2, callbacks=()):
    """The losses of some epochs of two batches, always in the same order."""
    if optimizer is not None:
        model.compile(optimizer, loss="mse")
    options = {"shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
    return model.fit(_X, _Y, batch_size=16, epochs=epochs, **options).history["loss"]


def _values(variables):
    """Their values, on the host: those of Keras are donated in the next step."""
    return [np.asarray(v.value) for v in variables]


@pytest.mark.parametrize("formats", _FORMATS, ids=str)
def test_steps_are_those_of_the_transformation(formats):
    """On the same list of arrays, bit for bit; leaves without a gradient stay."""
    start = [jnp.ones((4, 3), jnp.bfloat16), jnp.ones(3), jnp.ones(2, jnp.bfloat16)]
    variables = [keras.Variable(p, name=f"v{i}") for i, p in enumerate(start)]
    optimizer = Adamaxw(1e-2, weight_decay=0.1, **formats)
    optimizer.exclude_from_weight_decay(var_names=["1"])

    opt = adamaxw.adamaxw(1e-2, weight_decay=0.1, mask=[True, False, True], **formats)
    params, state = start, opt.init(start)
    drawn = [gradients("normal", 3, p.shape, seed) for seed, p in enumerate(start)]
    for i in range(3):
        grads = [jnp.asarray(g[i], p.dtype) for g, p in zip(drawn, start, strict=True)]
        grads[2] = None if i == 1 and formats == _FORMATS[0] else grads[2]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            optimizer.apply(grads, variables)
        updates, state = opt.update(grads, state, params)
        rows = zip(params, updates, strict=True)
        params = [p if u is None else apply_updates(p, u) for p, u in rows]
    assert_equal([v.value for v in variables], params)
    assert_equal(optimizer.state, state)
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(state)]
    assert [v.dtype for v in optimizer.variables[2:]] == dtypes
    paths = {v.path for v in optimizer.variables}
    assert len(paths) == len(optimizer.variables)
    assert {"adamaxw/count", "adamaxw/v1_mu", "adamaxw/v2_nu"} < paths


_AVERAGES = {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 3}


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": None, "clipvalue": 0.01, "learning_rate": lambda: 1e-2},
        {"clipnorm": 0.1, "gradient_accumulation_steps": 2, "loss_scale_factor": 128.0},
        {"learning_rate": _COSINE, "global_clipnorm": 0.1, **_AVERAGES},
    ],
    ids=", ".join,
)
def test_losses_are_those_of_the_adamax_of_keras(options):
    """It adds eps elsewhere, but decays the same; every option of the base class takes effect."""
    models, losses = [], []
    for optimizer_class in (Adamaxw, keras.optimizers.Adamax):
        arguments = {"learning_rate": 1e-2, "weight_decay": 0.1, "epsilon": 1e-12} | options
        optimizer = optimizer_class(**arguments)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        models.append(_model())
        losses.append(_fit(models[-1], optimizer))
    np.testing.assert_allclose(*losses, rtol=2e-6)
    for a, b in zip(*(_values(model.variables) for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    optimizer = models[0].optimizer
    assert int(optimizer.state.count) == int(optimizer.iterations)


@pytest.mark.parametrize(("policy", "formats"), [("float32", {}), ("bfloat16", _FORMATS[2])])
def test_training_goes_on_from_saved_weights_and_models(policy, formats, tmp_path):
    """Bit for bit, with the state, which decay, and the learning rate."""
    optimizers = [Adamaxw(_COSINE, weight_decay=0.3, **formats) for _ in range(2)]
    model, other = _model(policy), _model(policy)
    optimizers[0].exclude_from_weight_decay([model.layers[1].kernel], ["bias"])
    _fit(model, optimizers[0], epochs=1)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")

    model.save_weights(tmp_path / "model.weights.h5")
    other.compile(optimizers[1], loss="mse")
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


_halving = functools.partial(Adamaxw, 1.0, weight_decay=0.5, scale_decay_by_lr=False)


def _halved(optimizer, variables):
    """Which variables a step without gradients takes to half; the others stay."""
    before = _values(variables)
    optimizer.apply([jnp.zeros(v.shape) for v in variables], variables)
    factors = [np.unique(new / old) for new, old in zip(_values(variables), before, strict=True)]
    return [float(factor.item()) == 0.5 for factor in factors]


def _variables(*names):
    return [keras.Variable([2.0], name=name) for name in names]


def test_which_decay_is_part_of_the_config():
    """Before and after `build`, and for another model."""
    optimizer = _halving(moment_dtype=jnp.uint8)
    optimizer.exclude_from_weight_decay(var_names=["kernel"])  # replaced by the next
    optimizer.exclude_from_weight_decay(var_names="bias")
    for names in (("kernel", "bias"), ("bias", "kernel", "bias")):
        optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        # Indices hold for one model, names for any.
        optimizer.excluded = [x for x in optimizer.excluded if isinstance(x, str)]
        assert _halved(optimizer, _variables(*names)) == [name == "kernel" for name in names]
        assert optimizer.moment_dtype == "uint8"
    with pytest.raises(ValueError, match="exclude_from_weight_decay"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


def test_paths_indices_and_patterns_that_do_not_decay():
    """Each pattern is one of its own, also with flags; variables that do not train do not count."""
    optimizer, frozen = _halving(), keras.Variable([1.0])
    optimizer.exclude_from_weight_decay([0, frozen], ["gamma", "(?i)BIAS"])
    decays = _halved(optimizer, _variables("kernel", "bias", "gamma", "beta"))
    assert decays == [False, False, False, True]
    assert optimizer.get_config()["excluded"] == ["gamma", "(?i)BIAS", 0]
    # Keras itself knows only the last part of a path, which is the same in all layers.
    layers = [keras.layers.Dense(1, bias_initializer="ones", name=n) for n in ("encoder", "head")]
    variables = keras.Sequential([keras.layers.Input((4,)), *layers]).trainable_variables
    assert _halved(_halving(excluded=["encoder/"]), variables) == [False, False, True, True]


def test_learning_rates_of_callbacks_and_by_hand():
    """The one that is set is the one that the next step has; frozen layers have no state."""
    model = _model()
    model.layers[0].trainable = False
    frozen = _values(model.layers[0].variables)
    halve = keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2)
    _fit(model, Adamaxw(1e-2, weight_decay=0.5), callbacks=[halve])
    assert float(model.optimizer.learning_rate) == pytest.approx(2.5e-3)
    assert_equal(_values(model.layers[0].variables), frozen)
    assert len(model.optimizer.state.mu) == 2
    model.optimizer.learning_rate = 0.0
    before = _values(model.trainable_variables)
    _fit(model)
    assert_equal(_values(model.trainable_variables), before)


def test_mixed_float16_scales_losses():
    """A step whose gradients are not finite leaves parameters and state as they were."""
    model = _model("mixed_float16")
    losses = _fit(model, Adamaxw(1e-2), epochs=4)
    assert losses[-1] < losses[0]
    inner = model.optimizer.inner_optimizer
    before = _values([*model.trainable_variables, *inner.variables])
    model.train_on_batch(_X * 1e30, _Y)
    assert_equal(_values([*model.trainable_variables, *inner.variables]), before)
    assert int(inner.state.count) == int(inner.iterations) > 0


def test_distributed(request):
    """Eight devices take the steps of one up to last bits; the state lies as its variables do."""
    alone = _fit(_model(), Adamaxw(1e-2, moment_dtype="uint8"))
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*kernel"] = ("model", None)
    request.addfinalizer(lambda: keras.distribution.set_distribution(None))
    keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts))
    model = _model()
    np.testing.assert_allclose(_fit(model, Adamaxw(1e-2, moment_dtype="uint8")), alone, rtol=1e-4)
    shardings = [v.value.sharding for v in model.trainable_variables]
    assert shardings[0].spec == jax.P("model", None)
    for leaves in (model.optimizer.state.mu, model.optimizer.state.nu):
        assert [leaf.sharding for leaf in leaves] == shardings


def test_what_is_refused(monkeypatch):
    """Wrong arguments by name, a rounding that does not fit, and another backend."""
    for name, argument in (("b1", {"beta_1": 1.0}), ("moment_dtype", {"moment_dtype": "int8"})):
        with pytest.raises(ValueError, match=name):
            Adamaxw(**argument)
    with pytest.raises(TypeError, match="float16"):
        Adamaxw(param_rounding="exact").build([keras.Variable([1.0], dtype="float16")])
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(RuntimeError, match="KERAS_BACKEND"):
        Adamaxw()
