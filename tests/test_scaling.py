"""The plan for Llama 3 and for TPU pods: arithmetic, compiled programs, pages that show both."""

import itertools
import json
import math
from pathlib import Path

import jax
import optax
import pods
import pytest
import scaling
import trees
from jax.sharding import AbstractMesh, AxisType

from adamaxw.sharding import bytes_a_device

_PAGE = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
_PODS = json.loads(pods.RESULTS.read_text())
_NEEDS_REDUCED_TYPES = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="jax knows no reduced types before"
)


def test_shapes_are_those_of_the_models():
    numbers = (8_030_261_248, 70_553_706_496, 405_853_388_800)
    assert tuple(map(scaling.parameters, scaling.MODELS)) == numbers
    assert trees.stated()["llama-3-8b"][1] == numbers[0]


@pytest.mark.parametrize(
    "fmt",
    [
        pytest.param(fmt, marks=[] if fmt == scaling.FORMATS[-1] else pytest.mark.slow)
        for fmt in scaling.FORMATS
    ],
    ids=str,
)
def test_bytes_fall_with_the_number_of_devices(fmt):
    """Of the state always, down to 4,096; of parameters and gradients with FSDP alone."""
    size = {None: 8, "bfloat16": 4, "uint8": 2}[fmt.moment_dtype] + 2 * (fmt[2] == "exact")
    scalars = 12 if fmt.moment_dtype else 8 if fmt[2] == "stochastic" else 4
    width = {"float32": 4, "bfloat16": 2}[fmt.dtype]
    cells = itertools.product(scaling.STRATEGIES, scaling.MODELS, scaling.DEVICES)
    for strategy, model, n in cells:
        number = scaling.parameters(model)
        mesh = AbstractMesh((n, 1), ("data", "model"))
        found = scaling.run(scaling.optimizer_of(fmt), model, fmt.dtype, mesh, strategy)
        assert bytes_a_device(found.state) == number * size // n + scalars
        whole = number // (n if strategy == "FSDP" else 1)
        assert bytes_a_device(found.params) == whole * width


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("data", "tensor", "strategy"),
    [pytest.param(8, 1, "FSDP", marks=pytest.mark.slow), (4, 2, "ZeRO-1")],
)
def test_the_compiled_program_holds_what_was_planned(data, tensor, strategy, monkeypatch):
    """To the byte, on devices that exist."""
    monkeypatch.setitem(scaling.MODELS, "tiny", scaling.Llama(64, 128, 2))
    fmt = scaling.Format("bfloat16", "uint8", "exact")
    row = scaling.compiled(scaling.Compiled("tiny", data, tensor, strategy, fmt))
    assert row["arguments"] == row["planned"]
    # All but the three norms, whose width is split over "model" already.
    gathers = {} if strategy == "FSDP" else {"all-gather": len(scaling.shapes("tiny")) - 3}
    assert row["collectives"] == gathers


def test_lowers_for_4096_devices_that_are_not_there():
    """For TPU and GPU, on an abstract mesh."""
    mesh = AbstractMesh((512, 8), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    fmt = scaling.Format("bfloat16", "uint8", "stochastic")
    optimizer = scaling.optimizer_of(fmt)
    found = scaling.run(optimizer, "Llama-3-405B", fmt.dtype, mesh, "ZeRO-1")

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    where = jax.tree.map(lambda x: x.sharding, (found.params, found.state))
    traced = jax.jit(step, out_shardings=where).trace(found.params, found.state, found.grads)
    text = traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
    assert f"mhlo.num_partitions = {math.prod(mesh.shape.values())} : i32" in text


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("strategy", "way"),
    [
        ("ZeRO-1", pods.Way.BY_AXIS),
        pytest.param("ZeRO-1", pods.Way.AT_ONCE, marks=pytest.mark.slow),
        pytest.param("ZeRO-1", pods.Way.EXPLICIT, marks=[_NEEDS_REDUCED_TYPES, pytest.mark.slow]),
        pytest.param("FSDP", pods.Way.BY_AXIS, marks=pytest.mark.slow),
    ],
)
def test_the_step_of_a_pod_on_eight_cpu_devices(monkeypatch, strategy, way):
    """Bytes as planned, to the byte; the update gathers each parameter, or nothing."""
    monkeypatch.setattr(pods, "WIDTH", 64)
    monkeypatch.setattr(pods, "ROWS", 4)
    job = pods.Step(pods.Pod("cpu", (2, 4), 2), strategy, way, pods.FORMATS[1])
    row = pods.compiled(job, jax.devices())
    assert row["arguments"] == row["planned"]
    assert row["update"] == ({"all-gather f32[64,64]": 2} if strategy == "ZeRO-1" else {})


def test_reads_what_the_compiler_for_tpu_writes():
    """An asynchronous collective counts once; a fused all-reduce and slice is a reduce-scatter."""
    # As libtpu 0.0.42 writes it, shortened.
    text = (Path(__file__).parent / "fixtures" / "pod.hlo").read_text()
    assert scaling.collectives(text) == [
        ("all-gather", "f32[8,8]"),
        ("reduce-scatter", "bf16[2,8]"),
        ("reduce-scatter", "bf16[2,8]"),
        ("collective-permute", "f32[1,8]"),
        ("all-reduce", "f32[8]"),
    ]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, marks=[] if model == "Llama-3-8B" else pytest.mark.slow)
        for model in scaling.MODELS
    ],
)
def test_the_page_has_the_plan(model):
    assert "\n".join(scaling.plan(model)) in _PAGE


def test_the_page_has_the_committed_results():
    """All as planned; the update gathers the parameters, or nothing."""
    results = json.loads(scaling.RESULTS.read_text())
    assert "\n".join(scaling.compiled_table(results)) in _PAGE
    assert all(row["planned"] == row["arguments"] for row in results["rows"])
    for table in (pods.table_without_optimizer, pods.table, scaling.compiled_table):
        assert "\n".join(table(_PODS)) in _PAGE
    for row in _PODS["steps"]:
        kind = "all-reduce" if row["topology"] == pods.V5P.topology else "all-gather"
        dtype = {"float32": "f32", "bfloat16": "bf16"}[row["format"][0]]
        gathers = {f"{kind} {dtype}[8192,8192]": 2} if row["strategy"] == "ZeRO-1" else {}
        assert row["update"] == gathers
    for row in _PODS["steps"] + _PODS["rows"]:
        if row.get("way") != pods.Way.UNPLACED.value:
            most = 0.23 if (row.get("devices") or row["mesh"][0]) == 4096 else 0.001
            assert row["planned"] <= row["arguments"] <= row["planned"] * (1 + most)
