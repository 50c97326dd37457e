"""The example `vae.py`: it trains with each optimizer, draws, and refuses bad flags in a line."""

import math
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import vae
from command_lines import one_line_error

pytestmark = pytest.mark.usefixtures("compile_fast")


def _row(output, name):
    """The figures of a row of the table that the example prints."""
    (row,) = re.findall(rf"{name}(.*)", output)
    return [float(figure) for figure in re.findall(r"\d+\.\d+", row)]


@pytest.mark.parametrize("optimizer", ["adamaxw", "optax.adamw"])
def test_trains_and_draws(optimizer, tmp_path, capsys):
    """A few epochs cut the held-out negative ELBO by more than half; the picture is a PNG."""
    output = tmp_path / "new" / "folder"
    flags = ["--optimizer", optimizer, "--epochs", "6", "--output", str(output)]
    # Optax raises a float to an int32 power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("strict" if optimizer == "adamaxw" else "standard"):
        assert vae.main(flags) == 0
    printed = capsys.readouterr()
    before, after = _row(printed.out, "before training"), _row(printed.out, "after training")
    for total, reconstruction, kl in (before, after):
        assert total == pytest.approx(reconstruction + kl, abs=0.02)
    assert after[0] < 0.5 * before[0]
    assert after[2] > 5  # nats: the code carries information about the image
    assert printed.err == ""
    height, width, _ = matplotlib.image.imread(output / "vae.png", "png").shape
    assert (height, width) == (750, 1200)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--epochs", "1.5"], "--epochs"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "1438"], "--batch-size"),
        (["--latent", "0"], "--latent"),
        (["--latent", "65"], "--latent"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--learning-rate", "fast"], "--learning-rate"),
        (["--weight-decay", "inf"], "--weight-decay"),
        (["--optimizer", "sgd"], "--optimizer"),
        (["--output", __file__], "--output"),
        (["--output", f"{__file__}/folder"], "--output"),
        (["--unknown"], "--unknown"),
    ],
)
def test_refuses_bad_flags(flags, named, capsys):
    """Exit status 2, and one line on stderr that names the flag."""
    status, printed, line = one_line_error(vae.main, flags, capsys)
    assert (status, printed) == (2, "")
    assert named in line


def test_divergence_is_an_error(tmp_path, capsys, monkeypatch):
    """A bound that is not finite gives exit status 1, one line on stderr and no picture."""
    bounds = [vae.NegativeELBO(500.0, 0.1), vae.NegativeELBO(math.nan, 0.1)]
    monkeypatch.setattr(vae, "train", lambda model, *args: (model, [math.nan], bounds))
    status, _, line = one_line_error(vae.main, ["--output", str(tmp_path)], capsys)
    assert status == 1
    assert "diverged in epoch 1; try another --learning-rate" in line
    assert list(tmp_path.iterdir()) == []


def test_negative_elbo():
    """Reconstruction and KL agree with SciPy's binomial, and with the integral over the code."""
    model = vae.VAE(12, jax.random.key(0))
    images = vae.digits()[1]
    key = jax.random.key(1)
    bound = model.negative_elbo(images, key)

    mean, log_std = model.encode(images)
    z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    probabilities = scipy.special.expit(np.asarray(jax.vmap(model.decoder)(z), np.float64))
    log_likelihood = scipy.stats.binom.logpmf(np.asarray(images), 16, probabilities)
    np.testing.assert_allclose(bound.reconstruction, -log_likelihood.sum() / len(images), rtol=1e-5)

    mean, std = np.asarray(mean)[..., None], np.exp(np.asarray(log_std))[..., None]
    codes = mean + std * np.linspace(-10, 10, 2001)
    log_q = scipy.stats.norm.logpdf(codes, mean, std)
    integrand = np.exp(log_q) * (log_q - scipy.stats.norm.logpdf(codes))
    kl = scipy.integrate.trapezoid(integrand, codes, axis=-1)
    np.testing.assert_allclose(bound.kl, kl.sum() / len(images), rtol=1e-4)
