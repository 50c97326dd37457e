"""The benchmarks: the same work for all, results that merge, pages that match, peers' formulas."""

import json
import re
from pathlib import Path

import accelerators
import accelerators_page
import compiled_code
import contenders
import figures
import harness
import measure
import numpy as np
import peers
import pytest
import report
import results
import speed
import targets
import trees
from oracle import Oracle
from peers import FORMULAS, Formula
from runners import LEARNING_RATE, WEIGHT_DECAY

import adamaxw

pytestmark = pytest.mark.usefixtures("standard_promotion")

TINY = {"a": (3, 4), "b": (5,), "c": ()}
FIXTURES = Path(__file__).parent / "fixtures"
STEPS = 4
FAST = ("optax.adamaxw", "adamaxw float32, moments uint8", "keras.optimizers.Adamax")


def test_trees_have_the_stated_sizes():
    for name, stated in trees.stated().items():
        found = trees.shapes(name)
        assert (len(found), trees.count(found)) == stated
    assert (7, 7, 3, 64) in trees.shapes("resnet-50-hwio").values()
    with pytest.raises(ValueError, match="gpt-5"):
        trees.shapes("gpt-5")


def expected(rule, data):
    """Parameters after STEPS steps in float64, from the formula of each rule."""
    params = {name: value.astype(np.float64) for name, value in data.params()}
    sets = [dict(data.gradients(i)) for i in range(data.sets)]
    for name, p in params.items():
        opt = Oracle(p, LEARNING_RATE, wd=0.0 if rule == "L2" else WEIGHT_DECAY)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t in range(STEPS):
            g = sets[t % data.sets][name].astype(np.float64)
            if rule == "adamw":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
                p = p - LEARNING_RATE * (m_hat / (np.sqrt(v_hat) + 1e-8) + WEIGHT_DECAY * p)
            else:
                opt.step(g + WEIGHT_DECAY * opt.p if rule == "L2" else g)
                p = opt.p
        params[name] = p
    return params


def tolerance(name):
    """Of a parameter: the error of its rounding, and of the steps from rounded moments."""
    errors = {"optax.adamaxw, bfloat16": 0.02, "moments bfloat16": 0.01, "moments uint8": 0.07}
    part = next((part for words, part in errors.items() if words in name), 0)
    roundings = {"nearest": STEPS, "optax": STEPS, "stochastic": 2 * STEPS}
    often = next((number for word, number in roundings.items() if word in name), 1)
    narrow = ", bfloat16" in name or " bfloat16 " in name
    return part * LEARNING_RATE * STEPS + (often * 2.0**-9 * 0.1 if narrow else 5e-8)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in FAST else pytest.mark.slow)
        for name in contenders.CONTENDERS
        if name != "torch.optim.Adamax, compiled"  # takes a minute; the steps are those of foreach
    ],
)
@pytest.mark.filterwarnings("default")  # Other libraries warn when imported or compiling.
def test_each_contender_does_the_work_it_says(name):
    contender = contenders.CONTENDERS[name]
    if why := contender.missing():
        pytest.skip(why)
    data = trees.Data(TINY, contender.dtype, scale=0.05)
    runner = contender.make().build(data)
    for t in range(STEPS):
        runner.prepare(t)
        runner.step()
        runner.block()
    for leaf, exact in expected(contender.rule, data).items():
        value = runner.params()[leaf]
        assert value.dtype == contender.dtype
        np.testing.assert_allclose(value.astype(float), exact, rtol=0, atol=tolerance(name))
    size = trees.count(TINY) * contender.state_bytes
    assert runner.state_bytes() == pytest.approx(size, abs=24 + 8 * len(TINY))


@pytest.mark.parametrize(
    ("room", "mode"),
    [(2.5, "paired"), pytest.param(1.5, "in turn", marks=pytest.mark.slow), (0.5, None)],
)
def test_a_step_is_measured_in_pairs_in_turn_or_not_at_all(monkeypatch, room, mode):
    """As the memory allows."""
    monkeypatch.setitem(measure._BANDWIDTH_BYTES, "cpu", 2**16)
    one = harness.needs([contenders.REFERENCE], 1000, 1) - harness.SPARE
    monkeypatch.setattr(harness, "available_memory", lambda: harness.SPARE + int(room * one))
    (row,) = measure.step({"leaf": (1000,)}, [contenders.REFERENCE], budget=0.1, rounds=5)
    assert row.get("mode") == mode
    if mode is None:
        assert "of memory" in row["skipped"]
    else:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert {"seconds", "state_bytes", "least_bandwidth", "bandwidth"} < set(row)
        json.dumps(row)


def test_merging_keeps_other_rows_and_drops_unused_runs(tmp_path):
    found = results.load(tmp_path / "absent.json")
    for names in ("ab", "b", "a"):
        run = results.add_run(found, {"command": names})
        rows = [{"run": run, "tree": "tree", "contender": name} for name in names]
        results.merge(found, "step", rows)
        assert [row["contender"] for row in found["step"]] == ["a", "b"]
    assert list(found["runs"]) == ["2", "3"]
    results.write(tmp_path / "saved.json", found)
    assert results.load(tmp_path / "saved.json") == found


def test_pages_are_those_of_the_committed_results():
    """And every copy of the short tables is up to date."""
    assert report.PAGE.read_text(encoding="utf-8") == report.committed()
    assert accelerators_page.PAGE.read_text(encoding="utf-8") == accelerators_page.committed()
    docs, found = report.PAGE.parent, results.load(speed.OUTPUT)
    texts = [docs.parent / "README.md", *docs.glob("*.md")]
    pages = "".join(path.read_text(encoding="utf-8") for path in texts)
    for table in (report.summary(found), report.extremes(found)):
        assert pages.count(table[0]) == pages.count("\n".join(table))
    cycles = r"^\| float32, uint8 \| [\d.]+ \| [\d.]+ \(16\) \| [\d.]+ \| [\d.]+ \((0\.\d+)\)"
    ratios = re.findall(cycles, accelerators_page.committed(), re.M)
    readme = (docs.parent / "README.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"estimates {min(ratios)} to {max(ratios)} of Optax's cycles" in readme


def test_traffic_is_that_of_the_main_memory():
    # Half of the gradients and the parameters are copied to the chip; the first kernel reads the
    # gradients, writes 4 + 1 bytes, and finds the parameters there; the second reads and writes 4.
    moved = 512 * 128 * (2 // 2 + 4 + (2 + 4 + 1) + (4 + 4))
    scalar = 4
    assert compiled_code.traffic((FIXTURES / "step.hlo").read_text()) == (moved + scalar, 2)


def test_instructions_end_where_the_thread_does():
    names = compiled_code.opcodes((FIXTURES / "step.sass").read_text())
    assert names == ["LDG.E.128", "FMUL", "STG.E.128", "STG.E.U8", "EXIT"]
    assert compiled_code.stored(names) == 16 + 1


def test_a_missed_target_is_named_unless_its_cause_is_known(monkeypatch):
    def of(name, **figures):
        return {"tree": targets.LEAF, "row": name, "chip": "v5e"} | figures

    good = {"kernels": 1.0, "bytes": 16.0, "least": 16.0, "temporaries": 0.0, "cycles": 6.0}
    reference, name = of(targets.REFERENCE, cycles=10.0), "float32, uint8"
    assert all(x.held for x in targets.findings([reference, of(name, **good)]))
    rows = [reference, of(name, **good | {"bytes": 17.0, "cycles": 10.2})]
    size, cycles = (x for x in targets.findings(rows) if not x.held)
    allowed = "bytes, relative to the least: 1.06, at most 1 allowed"
    assert size.refusal() == f"{name}, v5e, leaf: {allowed}"
    excuse = targets.Shortfall("cycles / Optax", name, "v*", "*", 1.1, "because")
    monkeypatch.setattr(targets, "SHORTFALLS", (excuse,))
    found = targets.findings(rows)
    assert [x.target for x in found if not x.met] == [size.target, cycles.target]
    assert [x.target for x in found if not x.held] == [size.target]


def test_each_known_cause_is_of_a_missed_target():
    found = targets.findings(json.loads(accelerators.RESULTS.read_text())["rows"])
    assert set(targets.SHORTFALLS) <= {x.shortfall for x in found if not x.met}


def test_figures_of_a_package(tmp_path):
    """Code, comments and refusals by line; floors by the longest chain; a circle is found."""
    package = tmp_path / "adamaxw"
    package.mkdir()
    (package / "__init__.py").write_text("from adamaxw._b import f as f\n")
    (package / "_a.py").write_text('"""Doc\n\nstring."""\n\n# why\nX = 1  # why\n')
    refusing = (
        "def f(x):\n    if x:\n        raise ValueError(\n            x\n        )\n    raise X\n"
    )
    (package / "_b.py").write_text(f"from adamaxw._a import X\n\n\n{refusing}")
    (package / "keras.py").write_text("from adamaxw import f\n")
    source = figures.read(package / "_a.py")
    assert (source.lines, len(source.code), len(source.comments)) == (6, 1, 2)
    source = figures.read(package / "_b.py")
    assert (len(source.code), len(source.refusals), source.raises) == (7, 5, 2)
    assert figures.floors(package) == [["_a"], ["_b"], ["keras"]]
    (package / "_a.py").write_text("import adamaxw.keras\n")
    with pytest.raises(figures.CycleError):
        figures.floors(package)


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
    assert capsys.readouterr().out in (report.PAGE.parent / "comparison.md").read_text(
        encoding="utf-8"
    )


def test_the_formulas_are_those_of_the_oracle():
    start, grads = peers.RUNS["start"], peers.RUNS["gradients"]
    _, expected, _, _ = Oracle(start, peers.LR, peers.B1, peers.B2, peers.EPS, peers.WD).run(grads)
    got = Formula("in the maximum", "step").run(start, grads)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_what_the_eps_of_keras_and_none_as_in_the_paper_change():
    """Keras's is off by 1e-7 over the gradient; without eps, elements without gradient are 0/0."""
    start, grads = peers.RUNS["start"], peers.RUNS["gradients"]
    rates = peers.LR, peers.B1, peers.B2
    keras = Formula("added to the norm").run(start, grads, eps=1e-7)
    ours = peers.train(adamaxw.adamax(*rates, eps=1e-7), start, grads)
    smallest = np.min(np.max(np.abs(grads), axis=0))
    assert peers.distance(keras, ours) < len(grads) * peers.LR * 1e-7 / smallest
    paper = Formula("nowhere").run(start, grads)
    trained = grads[0] != 0
    assert np.isnan(paper[-1]).tolist() == (~trained).tolist()
    ours = peers.train(adamaxw.adamax(*rates, eps=1e-30), start, grads)
    assert np.isfinite(ours).all()
    assert peers.distance(paper[:, trained], ours[:, trained]) < 1e-12
