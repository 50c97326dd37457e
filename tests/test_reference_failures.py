"""Every row of the table in docs/comparison.md: the reference fails there, and we do not."""

import math
from pathlib import Path

import jax
import pytest
import reference_failures as failures

# As users have it.
pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_the_norm_decays():
    """0.999^2000 in float32, and for ever 1 in bfloat16."""
    row = failures.norm_never_decays()
    assert row.optax == 1.0
    assert row.ours == pytest.approx(row.exact, rel=1e-5)


def test_a_zero_gradient_in_float16():
    """No step, and no NaN."""
    row = failures.zero_gradient_in_float16()
    assert math.isnan(row.optax)
    assert row.ours == row.exact == 0.0


def test_decay_in_bfloat16():
    """Rounding to the nearest loses it in both; ours has a rounding that does not."""
    row = failures.decay_lost_in_bfloat16()
    assert row.optax == 1.0
    # A parameter ends within a few steps of bfloat16, 0.4%, of the mean of 10,000.
    assert row.ours == pytest.approx(row.exact, rel=1e-3)
    row = failures.decay_with_the_default_rounding()
    assert row.optax == row.ours == 1.0
    row = failures.decay_with_float32_parameters()
    assert row.ours == pytest.approx(row.exact, rel=1e-5)


def test_scan_with_float32_gradients():
    """The state keeps its dtypes."""
    row = failures.scan_with_float32_gradients()
    assert (row.optax, row.ours) == ("TypeError", "runs")


def test_injected_hyperparameters():
    """b2 = 1 is refused."""
    row = failures.injected_b2()
    assert (row.optax, row.ours) == (1.0, "TypeError")


def test_injected_mask():
    """A decay that is silently zero is refused."""
    row = failures.injected_mask()
    assert (row.optax, row.ours) == (0.0, "TypeError")


def test_nonsense_is_refused():
    """Where the reference returns a number or NaN."""
    rows = failures.nonsense_accepted()
    assert len(rows) == 4
    assert all(isinstance(row.optax, float) and row.ours == "ValueError" for row in rows)


def test_one_inf_gradient():
    """Not hidden, and skipped by the wrapper that is made for it."""
    row = failures.one_inf_gradient()
    assert math.isnan(row.optax)
    assert math.isnan(row.ours)
    row = failures.one_inf_gradient_skipped()
    assert (row.optax, row.ours) == ("TypeError", row.exact)


def test_state_memory():
    """By default two float32 moments, whatever the parameters; as few as two bytes on request."""
    rows = failures.state_memory()
    assert [row.optax for row in rows] == [8.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    assert [row.ours for row in rows] == [8.0, 4.0, 2.0, 8.0, 2.0, 4.0]


def test_the_pages_show_what_the_script_prints(capsys, monkeypatch):
    """All rows in docs/comparison.md, some of them in the README, and how many there are."""
    monkeypatch.setattr("sys.argv", ["reference_failures.py", "--markdown"])
    failures.main()
    printed = capsys.readouterr().out
    root = Path(__file__).parents[1]
    assert printed in (root / "docs" / "comparison.md").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    rows = printed.splitlines()
    assert sum(row in readme.splitlines() for row in rows) == 3
    assert f"[All {len(rows)} rows](docs/comparison.md" in readme


def test_the_script_prints_a_table(capsys, monkeypatch):
    """For people: all rows, the versions, the machine."""
    monkeypatch.setattr("sys.argv", ["reference_failures.py"])
    monkeypatch.setenv("COLUMNS", "300")
    failures.main()
    printed = capsys.readouterr().out
    assert all(row.situation in printed for row in failures.rows())
    assert f"jax {jax.__version__}" in printed
