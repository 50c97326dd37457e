"""Every row of the table in docs/comparison.md, and what the page says about it."""

from pathlib import Path

import numpy as np
import peers
import pytest
from oracle import Oracle
from peers import FORMULAS, Formula

import adamaxw

# As users have it.
pytestmark = pytest.mark.usefixtures("standard_promotion")
_PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"


def test_each_peer_follows_its_formula_and_no_other(capsys, monkeypatch):
    """To round-off of float64; ours can do the same unless eps is added to the norm."""
    rows = peers.rows()
    assert [row.peer for row in rows] == list(FORMULAS)
    for row in rows:
        assert row.off < 1e-12, row
        assert row.next_off > 1e-3, row
        assert bool(row.same) == (row.formula.eps != "added to the norm"), row
        assert row.ours_off < 1e-12 or not row.same, row
    monkeypatch.setattr(peers, "rows", lambda: rows)
    monkeypatch.setattr("sys.argv", ["peers.py", "--markdown"])
    peers.main()
    assert capsys.readouterr().out in _PAGE.read_text(encoding="utf-8")


def test_the_formulas_are_those_of_the_oracle():
    start, grads = peers.RUNS["start"], peers.RUNS["gradients"]
    _, expected, _, _ = Oracle(start, peers.LR, peers.B1, peers.B2, peers.EPS, peers.WD).run(grads)
    got = Formula("in the maximum", "step").run(start, grads)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_the_eps_of_keras_hardly_shows_at_its_default():
    """The same eps of 1e-7 in ours is off by 1e-7 over the gradient, where that is largest."""
    start, grads = peers.RUNS["start"], peers.RUNS["gradients"]
    keras = Formula("added to the norm").run(start, grads, eps=1e-7)
    ours = peers.train(adamaxw.adamax(peers.LR, peers.B1, peers.B2, 1e-7), start, grads)
    smallest = np.min(np.max(np.abs(grads), axis=0))
    assert peers.distance(keras, ours) < len(grads) * peers.LR * 1e-7 / smallest


def test_the_paper_has_no_eps():
    """An element without gradient is 0/0 there; the others are as in ours at its least eps."""
    start, grads = peers.RUNS["start"], peers.RUNS["gradients"]
    paper = Formula("nowhere").run(start, grads)
    trained = grads[0] != 0
    assert np.isnan(paper[-1]).tolist() == (~trained).tolist()
    ours = peers.train(adamaxw.adamax(peers.LR, peers.B1, peers.B2, 1e-30), start, grads)
    assert np.isfinite(ours).all()
    assert peers.distance(paper[:, trained], ours[:, trained]) < 1e-12
