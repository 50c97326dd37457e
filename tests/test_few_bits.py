"""Where few bits cost: the tasks, a short run, and the page with the figures of the long one."""

import json

import few_bits
import jax
import pytest
from small_tasks import TASKS

import adamaxw


def _committed():
    return json.loads(few_bits.RESULTS.read_text())


@pytest.mark.parametrize("name", TASKS)
def test_each_task_goes_from_a_key_to_one_loss(name):
    opt = adamaxw.adamax(1e-3, moment_dtype="uint8")
    found = jax.eval_shape(lambda key: TASKS[name].train(opt, key, 5), jax.random.key(0))
    assert (found.shape, found.dtype) == ((), "float32")


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_quick_run_prints_all_rows_and_saves_nothing(monkeypatch, capsys, tmp_path):
    """Of the task that compiles fastest; what the clipping costs shows already."""
    monkeypatch.setattr(few_bits, "TASKS", {"saddle point": TASKS["saddle point"]})
    monkeypatch.setattr(few_bits, "RESULTS", tmp_path / "few_bits.json")
    few_bits.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    for first in ("saddle point", "0", "0.01"):
        for rate in few_bits.RATES:
            assert sum(line.startswith(f"| {first} | {rate} |") for line in lines) == 1
    (worst,) = [line for line in lines if line.startswith("| 0.9 | 0.9 |")]
    assert float(worst.split("|")[4]) == pytest.approx(0.16, abs=0.01)
    assert not few_bits.RESULTS.exists()


def test_committed_results_have_all_rows():
    found, rates = _committed(), list(few_bits.RATES)
    assert [(row["task"], row["rate"]) for row in found["tasks"]] == [
        (name, rate) for name in TASKS for rate in rates
    ]
    assert len(found["quadratic"]) == 2 * len(rates)
    assert len(found["b2"]) == len(few_bits.B1S) * len(few_bits.B2S)
    for row in found["tasks"]:
        assert {len(x) for x in row["losses"].values()} == {TASKS[row["task"]].seeds}


def test_the_page_has_the_committed_tables_and_versions():
    """Those of a new run would take their place."""
    page, found = few_bits.PAGE.read_text(encoding="utf-8"), _committed()
    assert few_bits.with_tables(page, found) == page
    assert ", ".join(found["versions"].split(", ")[:2]) in page
    other = found | {"b2": [row | {"b1": 0.5} for row in found["b2"]]}
    assert few_bits.tables(other).split("\n\n")[-1] in few_bits.with_tables(page, other)
    with pytest.raises(ValueError, match="0 tables"):
        few_bits.with_tables("before", found)
