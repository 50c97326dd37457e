"""The example `language_model.py`: it trains with each optimizer and refuses bad flags."""

import re

import jax
import language_model
import matplotlib.image
import numpy as np
import pytest
from command_lines import one_line_error

_SMALL = ["--layers", "1", "--heads", "1", "--context", "16", "--batch-size", "32"]


pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamaxw", "bfloat16"), ("optax.adamw", "float32")],
)
def test_trains_and_draws(optimizer, dtype, tmp_path, capsys):
    """In a few steps the held-out loss falls clearly; the picture is a PNG."""
    flags = ["--optimizer", optimizer, "--dtype", dtype, "--steps", "40", "--output", str(tmp_path)]
    # Optax raises a float to an int32 power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("strict" if optimizer == "adamaxw" else "standard"):
        assert language_model.main([*_SMALL, *flags]) == 0
    printed = capsys.readouterr()
    before, after = (
        float(re.search(rf"{name} training\D+([\d.]+)", printed.out)[1])
        for name in ("before", "after")
    )
    assert before == pytest.approx(np.log(256), abs=0.1)
    assert after < 4.0
    assert "head/kernel" in printed.out
    assert dtype in printed.out
    assert "tokens" in printed.out
    assert ("at floor" in printed.out) == (optimizer == "adamaxw")
    assert printed.err == ""
    assert matplotlib.image.imread(tmp_path / "loss.png", "png").shape[:2] == (600, 960)


def test_same_seed_same_run(tmp_path, capsys):
    """The seed decides; the held-out windows are the same for all."""
    results = []
    for seed in ("1", "1", "2"):
        flags = ["--steps", "2", "--seed", seed, "--output", str(tmp_path)]
        language_model.main([*_SMALL, *flags])
        results.append(re.findall(r"training\D+([\d.]+)", capsys.readouterr().out))
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ([], (4.0, 8.0)),
        (["--moments", "uint8"], (4.0, 2.0)),
        (["--dtype", "bfloat16", "--moments", "uint8", "--rounding", "stochastic"], (2.0, 2.0)),
        (["--dtype", "bfloat16", "--moments", "bfloat16", "--rounding", "exact"], (2.0, 6.0)),
        (["--dtype", "bfloat16", "--optimizer", "optax.adamaxw"], (2.0, 4.0)),
    ],
)
def test_formats_and_rounding(flags, sizes, tmp_path, capsys):
    """Every format trains, and the bytes printed are those of the arrays, to the scalars."""
    with jax.numpy_dtype_promotion("standard"):
        flags = [*flags, "--steps", "1", "--output", str(tmp_path)]
        assert language_model.main([*_SMALL, *flags]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"([\d.]+) for parameters, ([\d.]+) for the optimizer's state", printed)
    assert tuple(map(float, found.groups())) == pytest.approx(sizes, abs=0.011)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--batch-size", "0"], "--batch-size"),
        (["--context", "0"], "--context"),
        (["--layers", "-1"], "--layers"),
        (["--heads", "0"], "--heads"),
        (["--seed", "-1"], "--seed"),
        (["--dtype", "float8"], "--dtype"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--weight-decay", "inf"], "--weight-decay"),
        (["--optimizer", "sgd"], "--optimizer"),
        (["--moments", "int8"], "--moments"),
        (["--rounding", "up"], "--rounding"),
        (["--optimizer", "optax.adamaxw", "--moments", "uint8"], "--moments"),
        (["--optimizer", "optax.adamw", "--rounding", "exact"], "--rounding"),
        (["--output", __file__], "--output"),
        (["--unknown"], "--unknown"),
    ],
)
def test_refuses_bad_flags(flags, named, capsys):
    """Exit status 2, and one line on stderr that names the flag."""
    status, printed, line = one_line_error(language_model.main, flags, capsys)
    assert (status, printed) == (2, "")
    assert named in line


def test_divergence_is_an_error(tmp_path, capsys):
    """A loss that is not finite gives exit status 1, one line on stderr and no picture."""
    flags = ["--learning-rate", "1e30", "--steps", "20", "--output", str(tmp_path)]
    status, _, line = one_line_error(language_model.main, [*_SMALL, *flags], capsys)
    assert status == 1
    assert re.search(r"diverged in step \d+; try another --learning-rate", line)
    assert list(tmp_path.iterdir()) == []


def test_without_sources(tmp_path, capsys, monkeypatch):
    """Where the standard library has no source files, exit status 1 and one line on stderr."""
    monkeypatch.setattr(language_model, "read_sources", lambda root: {})
    status, _, line = one_line_error(language_model.main, ["--output", str(tmp_path)], capsys)
    assert status == 1
    assert "too little Python source" in line


def test_data(tmp_path):
    """Files in a fixed order, up to a limit; none is in both parts; windows are parts of them."""
    for i in range(30):
        (tmp_path / f"{i:02}.py").write_bytes(bytes([i] * 100))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_bytes(b"x")
    sources = language_model.read_sources(tmp_path, max_bytes=2500)
    assert list(sources) == [f"{i:02}.py" for i in range(25)]
    split = language_model.split_sources(sources)
    assert set(split.held_out) == {"09.py", "19.py"}
    assert set(split.train) | set(split.held_out) == set(sources)
    assert not set(split.train) & set(split.held_out)

    data = language_model.as_array(split.held_out)
    windows = language_model.sample_windows(np.random.default_rng(0), data, 50, 10)
    assert windows.dtype == np.int32
    text = data.tobytes()
    assert all(bytes(window.astype(np.uint8)) in text for window in windows)
