"""The example `resume.py`: killed and started again it loses nothing, and a damage is an error."""

import gc
import json
import re
import shutil
from pathlib import Path

import checkpoints
import jax
import kills
import numpy as np
import pytest
import resume
from command_lines import one_line_error

_STEPS = 300


pytestmark = pytest.mark.usefixtures("compile_fast")


def test_killed_at_random_it_ends_as_if_undisturbed(tmp_path, monkeypatch):
    """Each start goes on from the last saved step or a later one, and the last bit is the same."""
    # Each start but the first finds its programs compiled.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    folders = [tmp_path / name for name in ("undisturbed", "killed")]
    for folder in folders:
        folder.mkdir()
    end = kills.undisturbed(folders[0], _STEPS)
    seed = np.random.SeedSequence().entropy % 2**32
    # No start ends in the time in which a kill at any moment falls.
    program = kills.RESUME._replace(start_up=1.5)
    survival = kills.killed(folders[1], 2, seed, _STEPS, program)
    assert kills.losses(survival, end) == [], f"with the seed {seed}: {survival}"
    assert survival.kills > 0, f"with the seed {seed}"


def test_the_page_says_what_was_measured():
    """The line in docs/checkpoints.md is that of the committed results."""
    totals = json.loads(kills.RESULTS.read_text())["totals"]
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    assert f"\n{kills.summary(totals)}\n" in page.read_text()


def _run(folder, *flags):
    """Runs the command; what it needs of Optax promotes."""
    with jax.numpy_dtype_promotion("standard"):
        return resume.main(["--output", str(folder), "--save-every", "5", *flags])


def test_stopped_and_started_again(tmp_path, capsys):
    """In the middle of an epoch and after one; the last three checkpoints stay."""
    assert _run(tmp_path / "whole", "--steps", "35") == 0
    *_, whole = capsys.readouterr().out.splitlines()
    for steps, first in (("12", "begins anew"), ("30", "goes on from step 12")):
        assert _run(tmp_path / "parts", "--steps", steps) == 0
        assert capsys.readouterr().out.startswith(first + "\n")
    assert _run(tmp_path / "parts", "--steps", "35") == 0
    *_, parts = capsys.readouterr().out.splitlines()
    assert parts == whole
    assert re.fullmatch(r"loss \d\.\d{4}, checksum [0-9a-f]{16}", parts)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"25", "30", "35"}
    assert _run(tmp_path / "parts", "--steps", "35") == 0
    assert capsys.readouterr().out == f"goes on from step 35\n{whole}\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 5 and 10."""
    folder = tmp_path_factory.mktemp("saved")
    _run(folder, "--steps", "10")
    return folder


def _flip_a_bit(checkpoint):
    """In the data of an array, the largest file."""
    file = max(checkpoint.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _cut_short(checkpoint):
    file = max(checkpoint.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _without_metadata(checkpoint):
    (checkpoint / "_CHECKPOINT_METADATA").unlink()


def _renamed(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("5"), checkpoint)


# Orbax waits for the first read that fails alone; the others complain when they are collected.
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)
@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_flip_a_bit, "its checksum differs"),
        (_cut_short, r"\w+"),
        (_empty, r"\w+"),
        (_without_metadata, r"\w+"),
        (_renamed, "it was saved as step 5"),
    ],
)
def test_a_damaged_checkpoint_is_an_error(damage, why, saved, tmp_path, capsys):
    """Which names it and what to do: without it, training goes on from the one before."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    damage(folder / "10")
    status, printed, line = one_line_error(
        lambda flags: _run(folder, *flags), ["--steps", "10"], capsys
    )
    assert (status, printed) == (1, "")
    named = re.escape(str(folder / "10"))
    assert re.search(rf"{named} is damaged or cannot be read \({why}\): move it away", line)
    assert (folder / "10").exists()

    shutil.move(folder / "10", tmp_path / "away")
    assert _run(folder, "--steps", "10") == 0
    assert capsys.readouterr().out.startswith("goes on from step 5\nsaved step 10\n")
    gc.collect()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--moments", "float32"], "10 was saved with --optimizer adamaxw"),
        (["--rounding", "exact"], "--moments uint8 --rounding stochastic: pass the same"),
        (["--learning-rate", "0.1"], "--learning-rate 0.003"),
        (["--seed", "1"], "--seed 0"),
    ],
)
def test_other_flags_than_those_it_was_saved_with(flags, named, saved, capsys):
    """What changes the steps must be passed again: one line says what it was."""
    status, printed, line = one_line_error(lambda flags: _run(saved, *flags), flags, capsys)
    assert (status, printed) == (1, "")
    assert named in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "9"], "is at step 10 already"),
        (["--save-every", "0"], "--save-every"),
        (["--moments", "int4"], "--moments"),
        (["--optimizer", "optax.adamaxw", "--moments", "bfloat16"], "--moments"),
        (["--output", __file__], "--output"),
    ],
)
def test_refuses_bad_flags(flags, named, saved, capsys):
    """Exit status 2, and one line on stderr that names the flag."""
    status, printed, line = one_line_error(lambda flags: _run(saved, *flags), flags, capsys)
    assert (status, printed) == (2, "")
    assert named in line


def test_divergence_is_an_error(tmp_path, capsys):
    """A loss that is not finite gives exit status 1 and one line on stderr."""
    flags = ["--learning-rate", "1e38", "--steps", "5"]
    status, _, line = one_line_error(lambda flags: _run(tmp_path, *flags), flags, capsys)
    assert status == 1
    assert "diverged; try another --learning-rate" in line


def test_checksum_tells_what_orbax_casts():
    """Equal values in another dtype, or under another name, are not the same."""
    tree = {"a": np.arange(3, dtype=np.uint8)}
    others = [{"a": np.arange(3, dtype=np.int8)}, {"b": tree["a"]}, {"a": tree["a"][:, None]}]
    sums = {checkpoints.checksum(other) for other in (tree, *others)}
    assert len(sums) == 4
    assert checkpoints.checksum({"a": tree["a"].copy()}) in sums
