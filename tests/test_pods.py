"""Whole TPU pods: the step that is compiled for them, and the page that shows what came of it."""

import json
from pathlib import Path

import jax
import pods
import pytest
import scaling

_PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
_RESULTS = json.loads(pods.RESULTS.read_text())
_NEEDS_REDUCED_TYPES = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="jax knows no reduced types before"
)

# As libtpu 0.0.42 writes it, shortened.
_TPU = """HloModule jit_step

%start (p: f32[2,8]) -> (f32[2,8], f32[8,8]) {
  %all-gather.1 = f32[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}
  ROOT %c = (f32[2,8], f32[8,8]) custom-call(%p), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: f32[2,8]) -> (f32[2,8], f32[8,8]) {
  %all-gather.2 = f32[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}
}

%done (p: f32[2,8]) -> f32[8,8] {
  %all-gather.3 = f32[8,8]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}
  ROOT %c = f32[8,8] custom-call(%p), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: bf16[8,8], q: bf16[8,8]) -> (bf16[2,8], bf16[2,8]) {
  %all-reduce.4 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) all-reduce(%p, %q), channel_id=1
}

ENTRY %main_spmd (p: f32[2,8]) -> f32[8,8] {
  %permute = (f32[1,8]{1,0}, f32[1,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%p)
  %all-reduce.5 = f32[8]{0} all-reduce(%fusion), channel_id=2
  %f = (bf16[2,8]{1,0}, bf16[2,8]{1,0}) fusion(%a, %b), calls=%all-reduce-scatter.1
}
"""


def test_reads_what_the_compiler_for_tpu_writes():
    """One that is asynchronous counts once; a fused all-reduce and slice is a reduce-scatter."""
    assert scaling.collectives(_TPU) == [
        ("all-gather", "f32[8,8]"),
        ("reduce-scatter", "bf16[2,8]"),
        ("reduce-scatter", "bf16[2,8]"),
        ("collective-permute", "f32[1,8]"),
        ("all-reduce", "f32[8]"),
    ]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("strategy", "way"),
    [
        ("ZeRO-1", pods.Way.AT_ONCE),
        ("ZeRO-1", pods.Way.BY_AXIS),
        pytest.param("ZeRO-1", pods.Way.EXPLICIT, marks=_NEEDS_REDUCED_TYPES),
        ("FSDP", pods.Way.BY_AXIS),
    ],
)
def test_the_step_on_eight_cpu_devices(monkeypatch, strategy, way):
    """Bytes as planned, to the byte; the update gathers each parameter, or nothing."""
    monkeypatch.setattr(pods, "WIDTH", 64)
    monkeypatch.setattr(pods, "ROWS", 4)
    job = pods.Step(pods.Pod("cpu", (2, 4), 2), strategy, way, pods.FORMATS[1])
    row = pods.compiled(job, jax.devices())
    assert row["arguments"] == row["planned"]
    assert row["update"] == ({"all-gather f32[64,64]": 2} if strategy == "ZeRO-1" else {})


def test_the_results_are_those_that_the_page_states():
    """Reduce-scatters where the sum goes axis by axis; bytes as planned; only gathers after."""
    for row in _RESULTS["steps"]:
        kind = "all-reduce" if row["topology"] == pods.V5P.topology else "all-gather"
        dtype = {"float32": "f32", "bfloat16": "bf16"}[row["format"][0]]
        gathers = {f"{kind} {dtype}[8192,8192]": 2} if row["strategy"] == "ZeRO-1" else {}
        assert row["update"] == gathers
        if row["topology"] == pods.V5E.topology:
            kinds = {name.split()[0] for name in row["gradients"]} - {"all-gather"}
            by_axis = row["way"] in (pods.Way.BY_AXIS.value, pods.Way.EXPLICIT.value)
            assert kinds == {"reduce-scatter" if by_axis else "all-reduce"}
    for row in _RESULTS["steps"] + _RESULTS["rows"]:
        if row.get("way") != pods.Way.UNPLACED.value:
            devices = row.get("devices") or row["mesh"][0]
            most = 0.23 if devices == 4096 else 0.001
            assert row["planned"] <= row["arguments"] <= row["planned"] * (1 + most)


def test_the_page_has_the_tables():
    """Those of the committed results."""
    page = _PAGE.read_text(encoding="utf-8")
    for table in (pods.table_without_optimizer, pods.table, scaling.compiled_table):
        assert "\n".join(table(_RESULTS)) in page
