"""The soak of benchmarks/soak.py: a thousandth of it, what it would notice, and what it found."""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import soak

import adamaxw

_STEPS = 2 * soak.BLOCK
_CEILING = 2**31 - 1
_CONTENDERS = soak.contenders()
_OURS = [name for name in _CONTENDERS if "optax" not in name]
_BOUNDS = {name: contender.bound for name, contender in _CONTENDERS.items()}
# Of the first moment, rms in units of the norm: twice what a million steps give.
_MOMENT_RMS = {"uint8": 0.016, "bfloat16": 0.003, "None": 1e-7}
_PAGE = Path(__file__).parents[1] / "docs" / "soak.md"


@functools.cache
def _found():
    with jax.numpy_dtype_promotion("standard"):  # As Optax needs it.
        return soak.soak(_CONTENDERS, _STEPS)


@functools.cache
def _late(count):
    """Float32 parameters alone; steps that are not the first, as the states say."""
    chosen = {name: _CONTENDERS[name] for name in _OURS if name.startswith("float32")}
    return soak.soak(chosen, _STEPS, count)


def _committed():
    return json.loads(soak.RESULTS.read_text())


def _rows(found, name):
    return [row for row in found["rows"] if row["contender"] == name]


def _assert_right(found, window=-1):
    """Norms within their bounds in all windows, first moments and parameters up to one.

    Parameters with lossless rounding follow float64 to the accuracy of the moments. Float32
    rounds a decay of 1e-6 of a parameter by up to 3%.
    """
    assert soak.violations(found, _BOUNDS) == []
    for row in found["rows"]:
        name = row["contender"]
        if name in _OURS:
            format_name = name.rpartition("moments ")[2]
            assert row["moment_rms"][window] < _MOMENT_RMS[format_name], row
        if name.startswith(("float32", "bfloat16 exact")):
            assert row["param_rms"][window] < 0.05 * row["moved"], row


def test_small_steps_are_right():
    """In every format, beside float64; parameters in float32 or with its bits go the whole way."""
    found = _found()
    _assert_right(found)
    for row in found["rows"]:
        if row["contender"].startswith(("float32", "bfloat16 exact", "optax")):
            assert row["way"] == pytest.approx(1, abs=0.01), row


@pytest.mark.parametrize("count", [10**9, _CEILING - _STEPS])
def test_late_steps_are_right(count):
    """After a billion steps, and up to the last one that is counted."""
    _assert_right(_late(count))


def test_steps_beyond_the_ceiling_of_the_count():
    """Without noise as right as before; with the same noise at each step within four times that.

    An error that repeats does not average out over the 1 / (1 - b1) = 10 steps that m remembers:
    10 equal errors add up to sqrt(10) times what 10 random ones do.
    """
    found = _late(_CEILING - soak.BLOCK)
    assert found["count"] == _CEILING
    _assert_right(found, window=0)
    for row in found["rows"]:
        name = row["contender"].rpartition("moments ")[2]
        more = 1 if name == "None" else 2
        assert row["moment_rms"][1] < more * _MOMENT_RMS[name], row


@pytest.mark.parametrize("moment_dtype", soak.BOUNDS)
def test_exact_trains_as_float32_does(moment_dtype):
    """Given the same gradients, all figures of a million steps are equal."""
    exact, wide = (
        _rows(_committed(), f"{params}, moments {moment_dtype}")
        for params in ("bfloat16 exact", "float32")
    )
    for a, b in zip(exact[:-1], wide[:-1], strict=True):
        assert a | {"contender": ""} == b | {"contender": ""}


@pytest.mark.parametrize("moment_dtype", soak.BOUNDS)
def test_nearest_loses_small_steps(moment_dtype):
    """It does not go 1% of the way."""
    for row in _rows(_found(), f"bfloat16 nearest, moments {moment_dtype}"):
        assert row["way"] < 0.01, row["kind"]


@functools.cache
def _walks():
    """The parameters that are rounded at random, eight times as many."""
    chosen = {name: _CONTENDERS[name] for name in _OURS if "stochastic" in name}
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(soak, "LANES", 8 * soak.LANES)
        return soak.soak(chosen, _STEPS)


# The rms of 256 walks is off by 1/23; of eight kinds one may be by three or four times that.
@pytest.mark.parametrize("moment_dtype", soak.BOUNDS)
def test_stochastic_walks_as_expected(moment_dtype):
    """Its error is that of an unbiased rounding of each step, and no more."""
    rows = _rows(_walks(), f"bfloat16 stochastic, moments {moment_dtype}")
    for row in rows:
        np.testing.assert_allclose(row["param_rms"][-1], row["walk"][-1], rtol=0.2)
    ratios = [row["param_rms"][-1] / row["walk"][-1] for row in rows]
    assert np.mean(ratios) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("changed", "seen_in"),
    [
        ({"b2": 0.99901}, "norm"),
        ({"eps": 1.001e-8}, "norm"),
        ({"b1": 0.9001}, "moment_rms"),
        ({"learning_rate": 1.02e-4}, "way"),
        ({"weight_decay": 1.02e-2}, "way"),
    ],
)
def test_what_is_slightly_wrong_is_noticed(changed, seen_in):
    """A formula that is off by a little breaks a bound of these tests."""
    settings = {"learning_rate": soak.LEARNING_RATE, "weight_decay": soak.WEIGHT_DECAY}
    wrong = soak.Contender(adamaxw.adamaxw(**settings | changed), "float32", soak.BOUNDS["None"])
    name = "float32, moments None"
    found = soak.soak({name: wrong}, _STEPS)
    rows = _rows(found, name)
    if seen_in == "norm":
        assert soak.violations(found, _BOUNDS) != []
    elif seen_in == "moment_rms":
        assert np.max([row["moment_rms"] for row in rows]) > _MOMENT_RMS["None"]
    else:
        assert max(row["way"] for row in rows) > 1.01


def test_violations_are_named():
    """A wrong count and what is not finite; NaN is no small error."""
    found = _found()
    rows = [row | {"norm": [0.0, math.nan]} for row in _rows(found, _OURS[0])[:1]]
    spoiled = found | {"rows": rows, "counts": {_OURS[0]: 1}}
    count, norm, finite = soak.violations(spoiled, _BOUNDS)
    assert count == f"{_OURS[0]}: count 1, expected {_STEPS}"
    assert norm == f"{_OURS[0]}, normal: norm off by nan octaves"
    assert finite == f"{_OURS[0]}, normal: not finite"


def test_steps_are_small():
    """Below what a bfloat16 from 1 to 2 notices, by the factor that benchmarks/soak.py says."""
    for found in (_found(), _committed()):
        assert found["largest_step"] < 2**-8 / 35


def test_the_committed_run_is_a_million_steps_without_violation():
    """All combinations and kinds, each to the end, and as right as the first steps."""
    found = _committed()
    assert soak.violations(found, _BOUNDS) == []
    assert found["counts"] == dict.fromkeys(_CONTENDERS, 1_000_000)
    assert len(found["rows"]) == len(_CONTENDERS) * len(soak.KINDS)
    _assert_right(found)


def test_the_page_says_what_was_measured():
    """The tables in docs/numerics.md are those of the committed results."""
    assert f"\n{soak.tables(_committed())}\n" in _PAGE.read_text(encoding="utf-8")


def test_report_prints_what_was_measured(capsys, monkeypatch):
    """And ends well where nothing is violated, else with what is."""
    monkeypatch.setattr("sys.argv", ["soak.py", "--report"])
    soak.main()
    assert capsys.readouterr().out.endswith(f"\n{soak.tables(_committed())}\n")
    monkeypatch.setattr(soak, "violations", lambda found, bounds: ["norm off"])
    with pytest.raises(SystemExit, match="norm off"):
        soak.main()
