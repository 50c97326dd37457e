"""The plan for Llama 3: its arithmetic, the compiled program, and the page that shows both."""

import json
import math
from pathlib import Path

import jax
import optax
import pytest
import scaling
import trees
from jax.sharding import AbstractMesh, AxisType

from adamaxw.sharding import bytes_a_device

_PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_shapes_are_those_of_the_models():
    """As many parameters as each has; those of the 8B model are listed leaf by leaf."""
    numbers = {
        "Llama-3-8B": 8_030_261_248,
        "Llama-3-70B": 70_553_706_496,
        "Llama-3-405B": 405_853_388_800,
    }
    assert {model: scaling.parameters(model) for model in scaling.MODELS} == numbers
    assert trees.stated()["llama-3-8b"][1] == numbers["Llama-3-8B"]


@pytest.mark.parametrize("fmt", scaling.FORMATS, ids=lambda fmt: "-".join(map(str, fmt)))
@pytest.mark.parametrize("strategy", scaling.STRATEGIES)
def test_bytes_fall_with_the_number_of_devices(strategy, fmt):
    """State by all of it, down to 4,096; parameters and gradients with FSDP alone."""
    size = {None: 8, "bfloat16": 4, "uint8": 2}[fmt.moment_dtype] + 2 * (fmt[2] == "exact")
    scalars = 12 if fmt.moment_dtype else 8 if fmt[2] == "stochastic" else 4
    width = {"float32": 4, "bfloat16": 2}[fmt.dtype]
    for model in scaling.MODELS:
        number = scaling.parameters(model)
        for n in scaling.DEVICES:
            mesh = AbstractMesh((n, 1), ("data", "model"))
            found = scaling.run(scaling.optimizer_of(fmt), model, fmt.dtype, mesh, strategy)
            assert bytes_a_device(found.state) == number * size // n + scalars
            whole = number // (n if strategy == "FSDP" else 1)
            assert bytes_a_device(found.params) == whole * width


@pytest.mark.usefixtures("standard_promotion")
def test_the_compiled_program_holds_what_was_planned(monkeypatch):
    """To the byte, on devices that exist, with both axes of a mesh."""
    monkeypatch.setitem(scaling.MODELS, "tiny", scaling.Llama(64, 128, 2))
    fmt = scaling.Format("bfloat16", "uint8", "exact")
    for job in (
        scaling.Compiled("tiny", 8, 1, "FSDP", fmt),
        scaling.Compiled("tiny", 4, 2, "ZeRO-1", fmt),
    ):
        row = scaling.compiled(job)
        assert row["arguments"] == row["planned"]
        # All but the three norms, whose width is split over "model" already.
        gathers = {} if job.strategy == "FSDP" else {"all-gather": len(scaling.shapes("tiny")) - 3}
        assert row["collectives"] == gathers


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_lowers_for_4096_devices_that_are_not_there(axis_type):
    """For TPU and GPU, with a mesh of which no device exists."""
    mesh = AbstractMesh((512, 8), ("data", "model"), axis_types=(axis_type,) * 2)
    fmt = scaling.Format("bfloat16", "uint8", "stochastic")
    optimizer = scaling.optimizer_of(fmt)
    found = scaling.run(optimizer, "Llama-3-405B", fmt.dtype, mesh, "ZeRO-1")

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    where = jax.tree.map(lambda x: x.sharding, (found.params, found.state))
    traced = jax.jit(step, out_shardings=where).trace(found.params, found.state, found.grads)
    text = traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
    devices = math.prod(mesh.shape.values())
    assert f"mhlo.num_partitions = {devices} : i32" in text


def test_the_page_has_the_tables():
    """Those of the plan as it is now, and of the committed results."""
    page = _PAGE.read_text(encoding="utf-8")
    for model in scaling.MODELS:
        assert "\n".join(scaling.plan(model)) in page
    results = json.loads(scaling.RESULTS.read_text())
    assert "\n".join(scaling.compiled_table(results)) in page
    assert all(row["planned"] == row["arguments"] for row in results["rows"])
