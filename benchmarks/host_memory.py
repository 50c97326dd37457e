"""What it costs to keep the state in host memory and stream it in for each update.

Steps with the state in the one and in the other memory alternate. On an accelerator what is
measured is its connection to the host; on a CPU the two memories are the same, and what is left is
the copies. Run it with

    python benchmarks/host_memory.py    # prints a table
"""

from typing import Any

import harness
import jax
import optax
from jax_contenders import JaxRunner, on_device
from trees import Data, shapes
from versions import versions

import adamaxw

TREE = "gpt2-small"
SECONDS = 60


def runner(moment_dtype: str | None, memory_kind: str | None) -> JaxRunner:
    """Steps of an optimizer whose state lies in one kind of memory and is copied for each step."""
    data = Data(shapes(TREE), sets=1)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: Any = jax.device_put(on_device(data.params()), device)
    grads = jax.device_put(on_device(data.gradients(0)), device)
    optimizer = adamaxw.adamaxw(1e-4, moment_dtype=moment_dtype)
    near = adamaxw.sharding.of_state(optimizer, params)
    place = adamaxw.sharding.of_state(optimizer, params, memory_kind=memory_kind)
    state = jax.jit(optimizer.init, out_shardings=place)(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, jax.device_put(state, near), params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, out_shardings=(device, place), donate_argnums=(0, 1))
    return JaxRunner(compiled, params, state, [grads], list(params))


def main() -> None:
    """Prints the ratio of the two times, and the bytes of state per parameter."""
    print(f"{TREE}, float32 parameters; {versions()}\n")
    print("| moments | state in host memory, bytes per parameter | step, times that without |")
    print("|---|--:|--:|")
    for moment_dtype in (None, "bfloat16", "uint8"):
        reference, contender = (runner(moment_dtype, kind) for kind in (None, "pinned_host"))
        found = harness.paired(reference, contender, SECONDS, 60)
        size = found["state_bytes"] / sum(x.size for x in reference.params().values())
        ratio = found["ratio"]
        print(
            f"| {moment_dtype or 'float32'} | {size:.2f} | **{ratio['median']:.2f}** "
            f"({ratio['low']:.2f}-{ratio['high']:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
