"""The benchmarks: same work for all, results that merge, pages that are the results'."""

import json

import accelerators
import accelerators_page
import compiled_code
import contenders
import harness
import measure
import numpy as np
import pytest
import report
import results
import speed
import targets
import trees
from oracle import Oracle

TINY = {"a": (3, 4), "b": (5,), "c": ()}
LR, WD = contenders.LEARNING_RATE, contenders.WEIGHT_DECAY
STEPS = 4


@pytest.mark.parametrize("name", trees.stated())
def test_shapes_have_the_stated_numbers_of_leaves_and_parameters(name):
    found = trees.shapes(name)
    assert (len(found), trees.count(found)) == trees.stated()[name]


def test_kernels_first_are_the_same_leaves_transposed():
    last, first = trees.shapes("resnet-50"), trees.shapes("resnet-50-hwio")
    assert trees.count(first) == trees.count(last)
    assert (64, 3, 7, 7) in last.values()
    assert (7, 7, 3, 64) in first.values()
    assert first["0000"][-1] == last["0000"][0]


@pytest.mark.parametrize(("name", "size"), [("leaf-1000", 1000), ("leaf-1e9", 10**9)])
def test_single_leaf_has_the_size_in_its_name(name, size):
    assert trees.count(trees.shapes(name)) == size


@pytest.mark.parametrize("name", ["gpt-2", "leaf-", "leaf-0", "leaf-many", "leaf-inf"])
def test_unknown_tree_is_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        trees.shapes(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_data_are_the_same_each_time_and_differ_between_sets(dtype):
    data = trees.Data(TINY, dtype)
    for name, value in data.gradients(0):
        assert (value.shape, value.dtype) == (TINY[name], dtype)
        np.testing.assert_array_equal(value, dict(data.gradients(0))[name])
        assert np.any(value != dict(data.gradients(1))[name])


def expected(rule, data):
    """Parameters after STEPS steps in float64, from the formula of each rule."""
    params = {name: value.astype(np.float64) for name, value in data.params()}
    sets = [dict(data.gradients(i)) for i in range(data.sets)]
    for name, p in params.items():
        opt = Oracle(p, LR, wd=0.0 if rule == "L2" else WD)
        m, v = np.zeros_like(p), np.zeros_like(p)
        for t in range(STEPS):
            g = sets[t % data.sets][name].astype(np.float64)
            if rule == "adamw":
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                m_hat, v_hat = m / (1 - 0.9 ** (t + 1)), v / (1 - 0.999 ** (t + 1))
                p = p - LR * (m_hat / (np.sqrt(v_hat) + 1e-8) + WD * p)
            else:
                opt.step(g + WD * opt.p if rule == "L2" else g)
                p = opt.p
        params[name] = p
    return params


def tolerance(name):
    """Of a parameter; that of float32 is far below what the decay makes, which is LR WD p STEPS."""
    rounding = STEPS * 2.0**-9 * 0.1 if "bfloat16 nearest" in name else 2.0**-9 * 0.1
    moments = {"moments bfloat16": 0.01, "moments uint8": 0.07}
    part = next((part for words, part in moments.items() if words in name), 0)
    if name == "optax.adamaxw, bfloat16":
        part, rounding = 0.02, STEPS * 2.0**-9 * 0.1
    if "bfloat16 stochastic" in name:
        rounding *= 2 * STEPS
    return part * LR * STEPS + (rounding if ", bfloat16" in name or " bfloat16 " in name else 5e-8)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", contenders.CONTENDERS)
@pytest.mark.filterwarnings("default")  # Those of peers, when they are imported or compile.
def test_each_contender_does_the_work_it_says(name):
    contender = contenders.CONTENDERS[name]
    why = contender.missing()
    if why:
        pytest.skip(why)
    if name == "torch.optim.Adamax, compiled":
        pytest.skip("its compiler takes a minute; the steps are those of foreach")
    data = trees.Data(TINY, contender.dtype, scale=0.05)
    runner = contender.make().build(data)
    for t in range(STEPS):
        runner.prepare(t)
        runner.step()
        runner.block()
    exact = expected(contender.rule, data)
    for leaf, value in runner.params().items():
        assert value.dtype == contender.dtype
        np.testing.assert_allclose(
            value.astype(np.float64), exact[leaf], rtol=0, atol=tolerance(name)
        )
    scalars = 24 + 8 * len(TINY)
    assert runner.state_bytes() == pytest.approx(
        trees.count(TINY) * contender.state_bytes, abs=scalars
    )


def test_float32_tolerance_tells_decay_from_none_and_from_l2():
    data = trees.Data(TINY, scale=0.05)
    decoupled, coupled = expected("adamaxw", data), expected("L2", data)
    gap = max(np.max(np.abs(decoupled[name] - coupled[name])) for name in TINY)
    assert gap > 10 * tolerance("adamaxw float32, moments float32")


STEP_KINDS = {
    "contender", "ratio", "seconds", "reference_seconds", "rounds", "repeats", "mode",
    "state_bytes", "program_bytes", "temporaries", "least_bytes", "least_bandwidth", "bandwidth",
    "gradient_sets",
}  # fmt: skip


@pytest.fixture
def small_bandwidth(monkeypatch):
    monkeypatch.setitem(measure._BANDWIDTH_BYTES, "cpu", 2**16)


@pytest.mark.usefixtures("small_bandwidth", "standard_promotion")
def test_step_gives_all_figures_of_each_contender():
    chosen = [contenders.REFERENCE, contenders.CONTENDERS["adamaxw float32, moments uint8"]]
    rows = list(measure.step(TINY, chosen, budget=0.1, rounds=5))
    assert [row["contender"] for row in rows] == [c.name for c in chosen]
    for row in rows:
        assert set(row) == STEP_KINDS
        assert row["mode"] == "paired"
        assert row["rounds"] == 5
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        json.dumps(row)


@pytest.mark.usefixtures("small_bandwidth", "standard_promotion")
@pytest.mark.parametrize(("room", "mode"), [(2.5, "paired"), (1.5, "in turn"), (0.5, None)])
def test_pairs_that_do_not_fit_run_in_turn_and_single_ones_not_at_all(monkeypatch, room, mode):
    tree = {"leaf": (1000,)}
    one = harness.needs([contenders.REFERENCE], 1000, 1) - harness.SPARE
    monkeypatch.setattr(harness, "available_memory", lambda: harness.SPARE + int(room * one))
    (row,) = measure.step(tree, [contenders.REFERENCE], budget=0.1, rounds=5)
    assert row.get("mode") == mode
    if mode is None:
        assert "of memory" in row["skipped"]
    else:
        assert set(row) == STEP_KINDS


@pytest.mark.usefixtures("standard_promotion")
def test_eager_and_compile_give_their_figures():
    chosen = contenders.CONTENDERS["adamaxw float32, moments float32"]
    (eager,) = measure.eager(TINY, [chosen], budget=0.1, rounds=5)
    assert eager["ratio"]["median"] > 0
    (cold,) = measure.compile_times(TINY, [chosen])
    assert set(cold) == {"contender", "trace", "compile"}


def row(tree, contender, run="1"):
    return {"run": run, "tree": tree, "contender": contender}


def test_merging_keeps_other_rows_and_drops_unused_runs(tmp_path):
    found = results.load(tmp_path / "absent.json")
    first = results.add_run(found, {"command": "first"})
    results.merge(found, "step", [row("a", "x", first), row("a", "y", first)])
    results.merge(found, "eager", [row("a", "x", first)])
    second = results.add_run(found, {"command": "second"})
    results.merge(found, "step", [row("a", "y", second), row("b", "x", second)])
    assert found["step"] == [row("a", "x", "1"), row("a", "y", "2"), row("b", "x", "2")]
    assert found["eager"] == [row("a", "x", "1")]
    results.merge(found, "step", [row("a", "x", second)])
    results.merge(found, "eager", [row("a", "x", second)])
    assert list(found["runs"]) == ["2"]
    results.write(tmp_path / "saved.json", found)
    assert results.load(tmp_path / "saved.json") == found


def test_quartiles_are_those_of_numpy():
    values = [3.0, 1.0, 2.0, 10.0]
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    assert results.quartiles(values) == {"median": median, "low": low, "high": high}
    assert results.quartiles([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trees", "gpt-5"], "gpt-5"),
        (["--contenders", "lion"], "lion"),
        (["--rounds", "1"], "--rounds"),
        (["--sections", "speed"], "speed"),
        (["--sections", "growth", "--trees", "resnet-50"], "nothing to measure"),
        (["--sections", "eager", "--contenders", "loop"], "nothing to measure"),
    ],
)
def test_unknown_names_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as exit_info:
        speed.main(flags)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


def test_jobs_are_the_plan_or_what_is_asked_for():
    jobs = speed.parse(["--sections", "eager", "step", "--trees", "leaf-10"]).jobs
    assert [(section, tree) for section, tree, _ in jobs] == [
        ("eager", "leaf-10"),
        ("step", "leaf-10"),
    ]
    assert all(contenders.CONTENDERS[name].eager for name in jobs[0][2])
    assert jobs[1][2] == list(contenders.CONTENDERS)
    jobs = speed.parse(["--contenders", "keras", "--sections", "step"]).jobs
    assert [names for *_, names in jobs] == [["keras.optimizers.Adamax"]] * len(speed.PLAN["step"])
    for plan in speed.PLAN.values():
        for names in plan.values():
            assert set(names) <= set(contenders.CONTENDERS)


@pytest.mark.parametrize("flags", [None, "--xla_cpu_prefer_vector_width=512"])
def test_command_tells_the_flags_of_the_compiler(flags, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    if flags:
        monkeypatch.setenv("XLA_FLAGS", flags)
    words = f"XLA_FLAGS={flags} " if flags else ""
    expected = f"{words}python benchmarks/speed.py --sections eager"
    assert speed.command(speed.parse(["--sections", "eager"])) == expected


def test_command_line_measures_prints_and_merges(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    path = tmp_path / "speed.json"
    other = row("leaf-10", contenders.REFERENCE.name)
    results.write(path, {"runs": {"1": {"command": "other"}}, "eager": [other]})
    flags = ["--sections", "eager", "--trees", "leaf-10", "--rounds", "2"]
    speed.main([*flags, "--contenders", "optax.adamw", "--output", str(path)])
    assert "optax.adamw" in capsys.readouterr().out
    found = results.load(path)
    assert [r["contender"] for r in found["eager"]] == [contenders.REFERENCE.name, "optax.adamw"]
    words = "--sections eager --trees leaf-10 --contenders optax.adamw --rounds 2"
    assert found["runs"]["2"]["command"] == f"python benchmarks/speed.py {words}"
    assert str(tmp_path) not in path.read_text()


def test_page_shows_figures_and_what_was_skipped():
    run = {
        "command": "python benchmarks/speed.py",
        "date": "2026-01-01",
        "machine": {
            "cpu": "A processor", "architecture": "x86_64", "cores": 2, "memory_gb": 23.0,
            "backend": "cpu", "device": "cpu",
        },
        "load": 0.1,
        "versions": {"jax": "0.10.2", "keras": None},
    }  # fmt: skip
    quartiles = {"median": 0.5, "low": 0.4, "high": 0.6}
    figures = {
        "ratio": quartiles, "seconds": quartiles, "mode": "in turn", "state_bytes": 8.0,
        "program_bytes": 40.0, "temporaries": 0.0, "least_bytes": 28.0, "least_bandwidth": 1e10,
        "bandwidth": 2e10,
    }  # fmt: skip
    steps = [
        row("leaf-1000", contenders.REFERENCE.name) | figures,
        row("leaf-1000", "keras.optimizers.Adamax") | {"skipped": "keras not installed"},
    ]
    text = report.page({"runs": {"1": run}, "step": steps, "growth": steps})
    assert "| optax.adamaxw | **0.50** (0.40-0.60), in turn | 500 ms | 50% | 28.00 |" in text
    assert "keras.optimizers.Adamax: keras not installed" in text
    assert "A processor" in text
    assert "not installed: keras" in text
    assert "--output benchmarks/results/speed-gpu.json" in text


def test_committed_page_is_that_of_the_committed_results():
    assert report.PAGE.read_text(encoding="utf-8") == report.committed()


def test_readme_has_the_table_of_the_committed_results():
    readme = (speed.HERE.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(report.summary(results.load(speed.OUTPUT))) in readme


HLO = """HloModule jit_step

%fused (a: f32[512,128]) -> f32[512,128] {
  %a = f32[512,128]{1,0} parameter(0)
  ROOT %b = f32[512,128]{1,0} negate(%a)
}

ENTRY %main (p: f32[512,128], g: bf16[512,128]) -> (f32[512,128], s8[512,128]) {
  %p = f32[512,128]{1,0:T(8,128)} parameter(0)
  %g = bf16[512,128]{1,0:T(8,128)(2,1)} parameter(1)
  %scalar = f32[]{:T(128)} fusion(), kind=kLoop, calls=%rate
  %slice-start = ((bf16[512,128]{1,0}), bf16[256,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%g)
  %slice-done = bf16[256,128]{1,0:S(1)} slice-done(%slice-start)
  %copy-start = (f32[512,128]{1,0:S(1)}, f32[512,128]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[512,128]{1,0:S(1)} copy-done(%copy-start)
  %step = (f32[512,128]{1,0}, s8[512,128]{1,0}) fusion(%copy-done, /*index=1*/%g, %scalar)
  %new = f32[512,128]{1,0} get-tuple-element(%step), index=0
  ROOT %out = f32[512,128]{1,0:T(8,128)} fusion(%new), kind=kLoop, calls=%fused
}
"""


def test_traffic_is_that_of_the_far_memory_and_counts_large_kernels():
    # Half of the gradients and the parameters are copied to the chip; the first kernel reads the
    # gradients, writes 4 + 1 bytes, and finds the parameters there; the second reads and writes 4.
    moved = 512 * 128 * (2 // 2 + 4 + (2 + 4 + 1) + (4 + 4))
    scalar = 4
    assert compiled_code.traffic(HLO) == (moved + scalar, 2)


def test_instructions_end_where_the_thread_does():
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 FMUL R13, R20.reuse, R13 ;
        /*0020*/                   STG.E.128 desc[UR4][R22.64], R16 ;
        /*0030*/                   STG.E.U8 desc[UR4][R8.64], R5 ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA `(.L_x_0);
        /*0060*/                   NOP;
    """
    names = compiled_code.opcodes(code)
    assert names == ["LDG.E.128", "FMUL", "STG.E.128", "STG.E.U8", "EXIT"]
    assert compiled_code.stored(names) == 16 + 1


def compiled_row(name, **figures):
    return {"tree": targets.LEAF, "row": name, "chip": "v5e"} | figures


def test_targets_refuse_what_misses_them_and_say_where(monkeypatch):
    good = {"kernels": 1.0, "bytes": 16.0, "least": 16.0, "temporaries": 0.0, "cycles": 6.0}
    reference = compiled_row(targets.REFERENCE, cycles=10.0)
    found = targets.findings([reference, compiled_row("float32, uint8", **good)])
    assert [x.value for x in found] == [1.0, 1.0, 0.0, 0.6]
    assert all(x.held for x in found)
    bad = good | {"bytes": 17.0, "cycles": 10.2}
    found = targets.findings([reference, compiled_row("float32, uint8", **bad)])
    size, cycles = (x for x in found if not x.held)
    for words in ("float32, uint8", "v5e", targets.LEAF, "bytes", "1.06", "at most 1 "):
        assert words in size.refusal()
    excuse = targets.Shortfall("cycles / Optax", "float32, uint8", "v*", "*", 1.1, "because")
    monkeypatch.setattr(targets, "SHORTFALLS", (excuse,))
    found = targets.findings([reference, compiled_row("float32, uint8", **bad)])
    assert [x.target for x in found if not x.met] == [size.target, cycles.target]
    assert [x.target for x in found if not x.held] == [size.target]


def test_rows_are_all_formats_and_roundings_and_each_target_has_some():
    assert len(targets.OURS) == 12
    for target in targets.TARGETS:
        assert target.rows
        assert set(target.rows) <= set(targets.ROWS)


def test_compiling_goes_on_where_it_was_until_the_package_changes(tmp_path, monkeypatch):
    jobs = accelerators.plan(["uint8", "exact"], ["v5e", "H100"], [targets.LEAF])
    done = []
    monkeypatch.setattr(accelerators, "run", lambda job: done.append(job) or {"seconds": 1.0})
    path = tmp_path / "accelerators.json"
    next(accelerators.measure(jobs, path))
    assert len(json.loads(path.read_text())["rows"]) == 1
    list(accelerators.measure(jobs, path))
    assert done == jobs
    assert list(accelerators.measure(jobs, path)) == []
    monkeypatch.setattr(accelerators, "source", lambda: "another")
    assert len(list(accelerators.measure(jobs, path))) == len(jobs) == 2


def test_causes_are_of_targets_that_the_committed_results_miss():
    found = targets.findings(json.loads(accelerators.RESULTS.read_text())["rows"])
    missed = {x.shortfall for x in found if not x.met}
    assert set(targets.SHORTFALLS) <= missed


def test_committed_page_of_accelerators_is_that_of_the_committed_results():
    assert accelerators_page.PAGE.read_text(encoding="utf-8") == accelerators_page.committed()
