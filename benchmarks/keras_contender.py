"""Keras 3's Adamax on its JAX backend, stepped as in its guide for JAX."""

import functools
import importlib
import os
from typing import Any

import jax
from jax_contenders import JaxRunner, on_device, timed_stages
from runners import B1, B2, EPS, LEARNING_RATE, WEIGHT_DECAY
from trees import Data, Shapes

# Keras reads this at import. The contender imports it by name, because it may be absent.
os.environ["KERAS_BACKEND"] = "jax"


class Adamax:
    """`stateless_apply`, jitted, variables donated."""

    def _start(self, data: Data) -> tuple[Any, list[jax.Array], list[jax.Array]]:
        """The step, and the values of the parameters and of the optimizer's variables."""
        keras = importlib.import_module("keras")
        opt = keras.optimizers.Adamax(LEARNING_RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY)
        variables = [keras.Variable(value) for _, value in data.params()]
        opt.build(variables)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, state: Any, gradients: Any) -> Any:
            return opt.stateless_apply(state, gradients, params)

        # The variables' own arrays are donated; from here on only their shapes are used.
        return step, [v.value for v in variables], [v.value for v in opt.variables]

    def build(self, data: Data) -> JaxRunner:
        """A runner with parameters, gradients and a fresh state."""
        step, params, state = self._start(data)
        sets = [list(on_device(data.gradients(i)).values()) for i in range(data.sets)]
        return JaxRunner(step, params, state, sets, list(data.tree))

    def eager(self, data: Data) -> JaxRunner:
        """Not available: the update is not separate from its application."""
        raise NotImplementedError("Keras has no update without its application")

    def compile_times(self, tree: Shapes, dtype: str) -> dict[str, float]:
        """Seconds of the stages."""
        step, params, state = self._start(Data(tree, dtype))
        return timed_stages(step, (params, state, params))
