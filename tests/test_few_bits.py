"""Where few bits cost: the tasks, a short run, and the page with the figures of the long one."""

import json

import few_bits
import jax
import numpy as np
import pytest
from small_tasks import TASKS, descend

import adamaxw


def _rows(found):
    keys = ("task", "rate", "noise", "b1", "b2")
    return {
        section: [[row[key] for key in keys if key in row] for row in found[section]]
        for section in ("tasks", "quadratic", "b2")
    }


@pytest.mark.parametrize("name", TASKS)
def test_each_task_goes_from_a_key_to_one_loss(name):
    opt = adamaxw.adamax(1e-3, moment_dtype="uint8")
    found = jax.eval_shape(lambda key: TASKS[name].train(opt, key, 5), jax.random.key(0))
    assert (found.shape, found.dtype) == ((), "float32")


def test_descend_takes_a_step_for_each_item():
    opt = adamaxw.adamax(0.5)
    start = jax.numpy.ones(3)
    got = descend(opt, lambda p, g: g, start, jax.numpy.ones((4, 3)))
    np.testing.assert_allclose(got, -1.0, rtol=1e-6)  # steps of the learning rate


def test_rate_is_constant_or_falls_to_0_with_the_same_sum():
    grads = jax.numpy.ones((100, 1))
    for falls, steps in ((0.0, [1.0] * 3), (1.0, [2.0, 1.98, 1.96])):
        opt = few_bits.optimizer("float32", 1.0, falls, 100)
        got = [descend(opt, lambda p, g: g, grads[0], grads[:n])[0] for n in range(4)]
        np.testing.assert_allclose(-np.diff(got), steps, rtol=1e-5)
        assert descend(opt, lambda p, g: g, grads[0], grads)[0] == pytest.approx(-100, abs=1.01)


@pytest.mark.usefixtures("compile_fast")
def test_quick_run_prints_all_rows_and_saves_nothing(monkeypatch, capsys, tmp_path):
    """Of the task that compiles fastest; what the clipping costs shows already."""
    chosen = {"saddle point": TASKS["saddle point"]}
    monkeypatch.setattr(few_bits, "TASKS", chosen)
    monkeypatch.setattr(few_bits, "RESULTS", tmp_path / "few_bits.json")
    few_bits.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    for name in chosen:
        for rate in few_bits.RATES:
            assert sum(line.startswith(f"| {name} | {rate} |") for line in lines) == 1
    for noise in ("0", "0.01"):
        for rate in few_bits.RATES:
            assert sum(line.startswith(f"| {noise} | {rate} |") for line in lines) == 1
    parts = {
        (b1, b2): [line for line in lines if line.startswith(f"| {b1} | {b2} |")]
        for b1 in few_bits.B1S
        for b2 in few_bits.B2S
    }
    assert all(len(found) == 1 for found in parts.values())
    assert float(parts[0.9, 0.9][0].split("|")[4]) == pytest.approx(0.16, abs=0.01)
    assert not few_bits.RESULTS.exists()


def test_saved_results_are_those_measured(monkeypatch, tmp_path):
    found = json.loads(few_bits.RESULTS.read_text())
    monkeypatch.setattr(few_bits, "RESULTS", tmp_path / "few_bits.json")
    few_bits.save(found)
    assert json.loads(few_bits.RESULTS.read_text()) == found


def test_committed_results_have_all_rows():
    found = json.loads(few_bits.RESULTS.read_text())
    rates = list(few_bits.RATES)
    assert _rows(found) == {
        "tasks": [[name, rate] for name in TASKS for rate in rates],
        "quadratic": [[rate, noise] for noise in (0.0, 0.01) for rate in rates],
        "b2": [[b1, b2] for b1 in few_bits.B1S for b2 in few_bits.B2S],
    }
    for row in found["tasks"]:
        assert {len(x) for x in row["losses"].values()} == {TASKS[row["task"]].seeds}


def test_the_page_has_the_committed_tables_and_versions(capsys):
    page = few_bits.PAGE.read_text(encoding="utf-8")
    found = json.loads(few_bits.RESULTS.read_text())
    assert few_bits.with_tables(page, found) == page
    few_bits.main(["--markdown"])
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
    assert ", ".join(found["versions"].split(", ")[:2]) in page


def test_tables_of_a_new_run_take_the_place_of_the_old():
    found = json.loads(few_bits.RESULTS.read_text())
    other = found | {"b2": [row | {"b1": 0.5} for row in found["b2"]]}
    page = f"before\n\n{few_bits.tables(found)}\n\nafter\n"
    assert few_bits.with_tables(page, other) == f"before\n\n{few_bits.tables(other)}\n\nafter\n"
    with pytest.raises(ValueError, match="0 tables"):
        few_bits.with_tables("before", found)
