"""Contenders in JAX: any `optax.GradientTransformation`, ours included."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from trees import Data, Leaves, Shapes

Tree = dict[str, jax.Array]


def on_device(leaves: Leaves) -> Tree:
    """Copies leaves to the device, because NumPy's memory cannot be donated."""
    return {name: jnp.array(value) for name, value in leaves}


def device_peak() -> int | None:
    """Peak bytes that JAX used on its accelerator; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def timed_stages(step: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """Seconds of tracing and lowering a jitted function, and of compiling it."""
    # The first use of a backend initializes it, which is not a cost of this program.
    jax.jit(jnp.negative)(jnp.zeros(3)).block_until_ready()
    begin = time.perf_counter()
    lowered = step.trace(*args).lower()
    middle = time.perf_counter()
    lowered.compile()
    return {"trace": middle - begin, "compile": time.perf_counter() - middle}


class JaxRunner:
    """Steps a jitted function of `(params, state, gradients)`, the first two donated."""

    def __init__(
        self,
        step: Any,
        params: Any,
        state: Any,
        sets: list[Any],
        names: list[str],
    ):
        self._step = step
        self._params, self._state = params, state
        self._sets, self._gradients = sets, sets[0]
        self._names = names

    def prepare(self, index: int) -> None:
        """Chooses the set of gradients."""
        self._gradients = self._sets[index % len(self._sets)]

    def step(self) -> None:
        """Starts one step."""
        self._params, self._state = self._step(self._params, self._state, self._gradients)

    def block(self) -> None:
        """Waits for parameters and state."""
        jax.block_until_ready((self._params, self._state))

    def state_bytes(self) -> int:
        """Bytes of all leaves of the state."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))

    def params(self) -> dict[str, np.ndarray]:
        """The parameters as they are now."""
        leaves = jax.tree.leaves(self._params)
        return {name: np.asarray(x) for name, x in zip(self._names, leaves, strict=True)}

    def analysis(self) -> dict[str, float]:
        """Bytes that the program accesses, and of its temporaries, as far as XLA reports them.

        The program is the one that the steps have compiled: JAX keeps it.
        """
        compiled = self._step.lower(self._params, self._state, self._gradients).compile()
        cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        found = {}
        if "bytes accessed" in cost:
            found["program_bytes"] = float(cost["bytes accessed"])
        if memory is not None:
            found["temporaries"] = float(memory.temp_size_in_bytes)
        return found

    def device_peak(self) -> int | None:
        """Peak bytes in use on an accelerator."""
        return device_peak()


class EagerRunner(JaxRunner):
    """Steps `update` alone, without jit: the state advances, the parameters do not."""

    def step(self) -> None:
        """Starts one update."""
        self._updates, self._state = self._step(self._gradients, self._state, self._params)

    def block(self) -> None:
        """Waits for updates and state."""
        jax.block_until_ready((self._updates, self._state))

    def analysis(self) -> dict[str, float]:
        """Nothing: there is no single program."""
        return {}


class Transformation:
    """An `optax.GradientTransformation`, its update and `optax.apply_updates` in one jit."""

    def __init__(self, opt: Any):
        self._opt = opt

    def _jitted(self) -> Callable[..., Any]:
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = self._opt.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return step

    def _runner(self, kind: type[JaxRunner], step: Any, data: Data) -> JaxRunner:
        # The state last, so that there is room for temporary copies until then.
        params = on_device(data.params())
        sets = [on_device(data.gradients(i)) for i in range(data.sets)]
        return kind(step, params, self._opt.init(params), sets, list(data.tree))

    def build(self, data: Data) -> JaxRunner:
        """A runner with parameters, gradients and a fresh state."""
        return self._runner(JaxRunner, self._jitted(), data)

    def eager(self, data: Data) -> JaxRunner:
        """Likewise, but a step is the update alone, without jit."""
        return self._runner(EagerRunner, self._opt.update, data)

    def compile_times(self, tree: Shapes, dtype: str) -> dict[str, float]:
        """Seconds of the stages, from shapes alone."""
        params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in tree.items()}
        state = jax.eval_shape(self._opt.init, params)
        return timed_stages(self._jitted(), (params, state, params))
