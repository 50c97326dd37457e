"""The examples in one process: each trains, resumes where it can, and reports errors in a line."""

import gc
import json
import math
import re
import shutil
from pathlib import Path

import distributed
import jax
import kills
import language_model
import matplotlib.image
import numpy as np
import pytest
import resume
import vae
import worker_kills
from command_lines import one_line_error

_SMALL = ["--layers", "1", "--heads", "1", "--context", "16", "--batch-size", "32"]

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.mark.parametrize(
    ("main", "flags", "named"),
    [
        (language_model.main, ["--steps", "0"], "--steps"),
        (language_model.main, ["--learning-rate", "nan"], "--learning-rate"),
        (language_model.main, ["--optimizer", "optax.adamw", "--rounding", "exact"], "--rounding"),
        (vae.main, ["--batch-size", "1438"], "--batch-size"),
        (vae.main, ["--output", __file__], "--output"),
        (resume.main, ["--save-every", "0"], "--save-every"),
        (distributed.main, ["--batch-size", "12"], "divisible by the number of devices, 8"),
        (distributed.main, ["--devices", "0"], "--devices: 0 is allowed only with --coordinator"),
        (distributed.main, ["--coordinator", "host:1", "--process", "2"], "--process: must be"),
    ],
)
def test_refuses_bad_flags(main, flags, named, tmp_path, monkeypatch, capsys):
    """Exit status 2, and one line on stderr that names the flag."""
    monkeypatch.chdir(tmp_path)
    status, printed, line = one_line_error(main, flags, capsys)
    assert (status, printed) == (2, "")
    assert named in line


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--dtype", "bfloat16", "--moments", "uint8", "--rounding", "stochastic"], (2.0, 2.0)),
        pytest.param(["--optimizer", "optax.adamw"], (4.0, 8.0), marks=pytest.mark.slow),
    ],
)
def test_language_model_trains(flags, sizes, tmp_path, capsys):
    """In a few steps the loss falls clearly; the bytes printed are those of the arrays."""
    # Optax raises a float to an int32 power, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard" if "optax.adamw" in flags else "strict"):
        flags = [*_SMALL, *flags, "--steps", "40", "--output", str(tmp_path)]
        assert language_model.main(flags) == 0
    printed, errors = capsys.readouterr()
    before, after = map(float, re.findall(r"(?:before|after) training\D+([\d.]+)", printed))
    assert before == pytest.approx(np.log(256), abs=0.1)
    assert after < 4.0
    assert ("floor" in printed) == ("optax.adamw" not in flags)  # a diagnostic
    assert errors == ""
    found = re.search(r"([\d.]+) for parameters, ([\d.]+) for the optimizer's state", printed)
    assert tuple(map(float, found.groups())) == pytest.approx(sizes, abs=0.011)
    assert matplotlib.image.imread(tmp_path / "loss.png", "png").shape[:2] == (600, 960)


def test_divergence_is_an_error(tmp_path, capsys, monkeypatch):
    """Exit status 1, one line on stderr and no picture."""
    bounds = [vae.NegativeELBO(500.0, 0.1), vae.NegativeELBO(math.nan, 0.1)]
    monkeypatch.setattr(vae, "train", lambda model, *args: (model, [math.nan], bounds))
    status, _, line = one_line_error(vae.main, ["--output", str(tmp_path)], capsys)
    assert status == 1
    assert "diverged in epoch 1; try another --learning-rate" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "optimizer", ["adamaxw", pytest.param("optax.adamw", marks=pytest.mark.slow)]
)
def test_vae_trains(optimizer, tmp_path, capsys):
    """A few epochs cut the held-out negative ELBO by more than half."""
    with jax.numpy_dtype_promotion("strict" if optimizer == "adamaxw" else "standard"):
        assert vae.main(["--optimizer", optimizer, "--epochs", "6", "--output", str(tmp_path)]) == 0
    printed, errors = capsys.readouterr()
    rows = re.findall(r"(?:before|after) training(.*)", printed)
    before, after = ([float(x) for x in re.findall(r"\d+\.\d+", row)] for row in rows)
    for total, reconstruction, kl in (before, after):
        assert total == pytest.approx(reconstruction + kl, abs=0.02)
    assert after[0] < 0.5 * before[0]
    assert after[2] > 5  # nats: the code carries information about the image
    assert errors == ""
    assert matplotlib.image.imread(tmp_path / "vae.png", "png").shape[:2] == (750, 1200)


def _resume(folder, *flags):
    with jax.numpy_dtype_promotion("standard"):
        return resume.main(["--output", str(folder), "--save-every", "5", *flags])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 5 and 10."""
    folder = tmp_path_factory.mktemp("saved")
    _resume(folder, "--steps", "10")
    return folder


def test_stopped_and_resumed(saved, tmp_path, capsys):
    """Ends with the bits of an uninterrupted run; the last three checkpoints stay."""
    assert _resume(tmp_path / "whole", "--steps", "20") == 0
    *_, whole = capsys.readouterr().out.splitlines()
    shutil.copytree(saved, tmp_path / "parts")
    assert _resume(tmp_path / "parts", "--steps", "20") == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "resuming from step 10"
    assert last == whole
    assert re.fullmatch(r"loss \d\.\d{4}, checksum [0-9a-f]{16}", last)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"10", "15", "20"}


def _flip_a_bit(checkpoint):
    """In the data of an array, the largest file."""
    file = max(checkpoint.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


# Orbax waits only for the first read that fails; the others complain when they are collected.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
def test_a_damaged_checkpoint_is_an_error(saved, tmp_path, capsys):
    """It names the checkpoint; once that is moved away, the run resumes from the one before."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    _flip_a_bit(folder / "10")
    status, printed, line = one_line_error(
        lambda flags: _resume(folder, *flags), ["--steps", "10"], capsys
    )
    assert (status, printed) == (1, "")
    said = "is damaged or cannot be read (its checksum differs): move it away"
    assert f"{folder / '10'} {said}" in line
    shutil.move(folder / "10", tmp_path / "away")
    assert _resume(folder, "--steps", "10") == 0
    assert capsys.readouterr().out.startswith("resuming from step 5\nsaved step 10\n")
    gc.collect()


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--rounding", "exact"], 1, "--moments uint8 --rounding stochastic: pass the same"),
        (["--steps", "9"], 2, "is at step 10 already"),
    ],
)
def test_flags_that_do_not_fit_the_checkpoint(flags, status, said, saved, capsys):
    """One line says what it was saved with."""
    found, printed, line = one_line_error(lambda flags: _resume(saved, *flags), flags, capsys)
    assert (found, printed) == (status, "")
    assert said in line


@pytest.mark.slow
def test_killed_at_random_it_ends_as_if_uninterrupted(tmp_path, monkeypatch):
    """Each start resumes from the last saved step or a later one; the last bit is the same."""
    # Each start but the first finds its programs compiled.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
    end = kills.undisturbed(folders[0], 300)
    seed = np.random.SeedSequence().entropy % 2**32
    # No start ends before a kill at a random moment falls.
    program = kills.RESUME._replace(start_up=1.5)
    survival = kills.killed(folders[1], 2, seed, 300, program)
    assert kills.losses(survival, end) == [], f"with the seed {seed}: {survival}"
    assert survival.kills > 0, f"with the seed {seed}"


@pytest.mark.parametrize(("script", "page"), [(kills, "checkpoints"), (worker_kills, "scaling")])
def test_the_pages_say_what_was_measured(script, page):
    totals = json.loads(script.RESULTS.read_text())["totals"]
    assert (totals["losses"], totals["kills"] >= 20) == (0, True)
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert f"\n{script.summary(totals)}\n" in text
