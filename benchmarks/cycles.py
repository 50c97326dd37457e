"""What the TPU compiler's cycle estimate for a kernel includes, and what it omits.

Compiles kernels of equal bytes with 1 to 100 operations per element, kernels of different bytes,
and one step on many small leaves, for TPUs (`make accelerators` creates the environment), and
compares the estimate with the bundles that the scheduled code issues. Run it with

    python benchmarks/cycles.py    # minutes; prints tables, writes results/cycles.json
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerators
import chips
import compiled_code
import results

RESULTS = Path(__file__).parent / "results" / "cycles.json"
SHAPE = (4096, 8192)
REPEATS = (1, 10, 100)
SMALL = 512  # leaves, of 1,024 elements


class Kernel(NamedTuple):
    """One kernel.

    Attributes:
        name: on the page.
        bytes: per element, read and written.
        dtype: of what is read and written.
        turn: of x, y and the number of the turn, the next x; y is read where the bytes say so.
    """

    name: str
    bytes: int
    dtype: str
    turn: Callable[[Any, Any, int], Any]


def _mix(x: Any, _: Any, i: int) -> Any:
    import jax.numpy as jnp
    from jax import lax

    bits = lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D + 2 * i)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _exp2(x: Any, _: Any, i: int) -> Any:
    import jax.numpy as jnp

    return jnp.exp2(x * _constant(x, i))


def _root(x: Any, _: Any, i: int) -> Any:
    import jax.numpy as jnp

    return jnp.sqrt(x + _constant(x, i))


def _constant(x: Any, i: int) -> Any:
    """A constant that differs per turn, so that no two turns are merged."""
    return x.dtype.type(1 + 1 / (i + 3))


OPERATIONS = (
    Kernel("product and sum", 12, "float32", lambda x, y, i: x * _constant(x, i) + y),
    Kernel("sum and division", 12, "float32", lambda x, y, i: y / (x + _constant(x, i))),
    Kernel("sum and square root", 8, "float32", _root),
    Kernel("product and exp2", 8, "float32", _exp2),
    Kernel("shift, xor and integer product", 8, "float32", _mix),
)
_NARROW = ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")
BYTES = (
    OPERATIONS[0],
    Kernel("product", 8, "float32", lambda x, _, i: x * _constant(x, i)),
    *(
        Kernel(
            f"product, {dtype} to {result}",
            sum(2 if name == "bfloat16" else 4 for name in (dtype, result)),
            dtype,
            lambda x, _, i, result=result: (x.astype("float32") * 1.5).astype(result),
        )
        for dtype, result in _NARROW
    ),
)


def compiled(kernel: Kernel, repeats: int, chip: str, leaves: int = 0) -> str:
    """The compiled kernel, on one array or on many small ones; x is donated."""
    import jax

    def apply(xs: Any, ys: Any) -> Any:
        def one(x: Any, y: Any) -> Any:
            for i in range(repeats):
                x = kernel.turn(x, y, i)
            return x

        return jax.tree.map(one, xs, ys)

    on = jax.sharding.SingleDeviceSharding(chips.device(chip))
    shape = (1024,) if leaves else SHAPE
    tree = max(leaves, 1) * [jax.ShapeDtypeStruct(shape, kernel.dtype, sharding=on)]
    return jax.jit(apply, donate_argnums=0).lower(tree, tree).compile().as_text() or ""


def measure() -> dict[str, Any]:
    """All kernels on all TPUs; cycles and bundles per 1,000 elements, or per small leaf."""
    found: dict[str, Any] = {"bytes": [], "operations": [], "small": []}
    n = SHAPE[0] * SHAPE[1] / 1000
    with tempfile.TemporaryDirectory() as folder:
        chips.prepare(Path(folder))
        for chip in chips.TPUS:
            jobs = [("bytes", kernel, 1) for kernel in BYTES]
            jobs += [("operations", kernel, k) for kernel in OPERATIONS for k in REPEATS]
            for section, kernel, repeats in jobs:
                for path in Path(folder).iterdir():
                    path.unlink()
                text = compiled(kernel, repeats, chip)
                issued = compiled_code.bundles(text, Path(folder))
                row = {"chip": chip, "kernel": kernel.name, "bytes": kernel.bytes}
                row |= {"repeats": repeats, "cycles": round(compiled_code.cycles(text) / n, 2)}
                found[section].append(row | {"bundles": issued and round(issued / n, 2)})
                print(section, found[section][-1], flush=True)
            text = compiled(OPERATIONS[0], 1, chip, SMALL)
            kernels = len(re.findall("estimated_cycles", text[text.index("ENTRY") :]))
            cycles = compiled_code.cycles(text) / SMALL
            found["small"].append({"chip": chip, "kernels": kernels, "cycles": round(cycles, 1)})
            print("small", found["small"][-1], flush=True)
    return found


def main() -> None:
    """Compiles, prints and writes."""
    argparse.ArgumentParser(description="What does the TPU compiler's estimate count?").parse_args()
    found = measure()
    results.write(RESULTS, {"versions": accelerators.versions(), **found})


if __name__ == "__main__":
    main()
