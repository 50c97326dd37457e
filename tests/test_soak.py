"""The soak of benchmarks/soak.py: its committed million steps, and a short run."""

import itertools
import json
from pathlib import Path

import jax
import pytest
import soak

_STEPS = 2 * soak.BLOCK
_CONTENDERS = soak.contenders()
_BOUNDS = {name: contender.bound for name, contender in _CONTENDERS.items()}
# Of the first moment, rms in units of the norm: twice what a million steps give.
_MOMENT_RMS = {"uint8": 0.016, "bfloat16": 0.003, "None": 1e-7}
_DOCS = Path(__file__).parents[1] / "docs"


def _committed():
    return json.loads(soak.RESULTS.read_text())


def _assert_right(found):
    """Norms within their bounds, first moments and parameters as accurate as their formats."""
    assert soak.violations(found, _BOUNDS) == []
    assert found["largest_step"] < 2**-8 / 35  # what the script says
    for row in found["rows"]:
        name = row["contender"]
        if "optax" not in name:
            assert row["moment_rms"][-1] < _MOMENT_RMS[name.rpartition("moments ")[2]], row
        if name.startswith(("float32", "bfloat16 exact")):
            # Float32 rounds a decay of 1e-6 of a parameter by up to 3%.
            assert row["param_rms"][-1] < 0.05 * row["moved"], row
            assert row["way"] == pytest.approx(1, abs=0.01), row
        elif name.startswith("bfloat16 nearest"):
            assert row["way"] < 0.01 or row["kind"] == "feedback", row


def test_the_committed_run_is_right():
    """A million steps of every format and rounding stay within the bounds."""
    found = _committed()
    _assert_right(found)
    assert found["counts"] == dict.fromkeys(_CONTENDERS, 1_000_000)
    assert len(found["rows"]) == len(_CONTENDERS) * len(soak.KINDS)
    rows = {(row.pop("contender"), row["kind"]): row for row in found["rows"]}
    for moment_dtype, kind in itertools.product(soak.BOUNDS, soak.GIVEN):
        # Given the same gradients, "exact" and float32 are equal to the last figure.
        exact, wide = (f"{p}, moments {moment_dtype}" for p in ("bfloat16 exact", "float32"))
        assert rows[exact, kind] == rows[wide, kind]


@pytest.mark.slow
def test_a_short_run_is_right():
    """Two thousand steps of every format and rounding stay within the bounds."""
    with jax.numpy_dtype_promotion("standard"):  # As Optax needs it.
        _assert_right(soak.soak(_CONTENDERS, _STEPS))


def test_the_page_says_what_was_measured(capsys, monkeypatch):
    """A page has the tables of the report, which fails only if a bound is violated."""
    monkeypatch.setattr("sys.argv", ["soak.py", "--report"])
    soak.main()
    tables = soak.tables(_committed())
    assert capsys.readouterr().out.endswith(f"\n{tables}\n")
    pages = [page.read_text(encoding="utf-8") for page in _DOCS.glob("**/*.md")]
    assert sum(f"\n{tables}\n" in page for page in pages) == 1
    monkeypatch.setattr(soak, "violations", lambda found, bounds: ["norm off"])
    with pytest.raises(SystemExit, match="norm off"):
        soak.main()
