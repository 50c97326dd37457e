"""Every row of the table in docs/comparison.md, and what the page says beside it."""

from pathlib import Path

import numpy as np
import optax
import peers
import pytest
from oracle import Oracle
from peers import FORMULAS, Formula

import adamaxw

# As users have it.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("peer", FORMULAS)
def test_each_peer_follows_its_formula_and_no_other(peer):
    """To round-off of float64 the one; the next is off by far more."""
    row = peers.row(peer)
    assert row.off < 1e-12
    assert row.next_off > 1e-3


@pytest.mark.parametrize(
    "peer", [name for name, f in FORMULAS.items() if f.eps != "added to the norm"]
)
def test_ours_can_do_the_same(peer):
    """What the table says gives the parameters of the peer, to round-off of float64."""
    row = peers.row(peer)
    assert row.same
    assert row.ours_off < 1e-12


def test_the_formulas_are_those_of_the_oracle():
    """That of AdamaxW, as the tests of this package have it."""
    start, grads = peers.RUNS["start"], peers.RUNS["gradients"]
    _, expected, _, _ = Oracle(start, peers.LR, peers.B1, peers.B2, peers.EPS, peers.WD).run(grads)
    np.testing.assert_allclose(
        Formula("in the maximum", "step").run(start, grads), expected, rtol=0, atol=1e-14
    )


def test_the_eps_of_keras_is_hardly_seen_at_its_default():
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
    assert np.isnan(paper[-1]).tolist() == (grads[0] == 0).tolist()
    ours = peers.train(adamaxw.adamax(peers.LR, peers.B1, peers.B2, 1e-30), start, grads)
    assert np.isfinite(ours).all()
    trained = grads[0] != 0
    assert peers.distance(paper[:, trained], ours[:, trained]) < 1e-12


def test_the_page_shows_what_the_script_prints(capsys, monkeypatch):
    """Every row, word for word."""
    monkeypatch.setattr("sys.argv", ["peers.py", "--markdown"])
    peers.main()
    page = (Path(__file__).parents[1] / "docs" / "comparison.md").read_text()
    assert capsys.readouterr().out in page


def test_the_script_prints_a_table(capsys, monkeypatch):
    """For people: all rows, and the versions of all peers."""
    monkeypatch.setattr("sys.argv", ["peers.py"])
    monkeypatch.setenv("COLUMNS", "300")
    peers.main()
    printed = capsys.readouterr().out
    assert all(peer in printed for peer in FORMULAS)
    assert str(peers.RUNS["versions"]) in printed
    assert f"optax {optax.__version__}" in printed
