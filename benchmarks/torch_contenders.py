"""Contenders in PyTorch: its Adamax in three variants, and that of pytorch_optimizer.

Torch is imported by name: it may be absent.
"""

import importlib
import os
import time
from typing import Any

import jax
import numpy as np
from runners import B1, B2, EPS, LEARNING_RATE, WEIGHT_DECAY
from trees import Data, Leaves, Shapes


class TorchRunner:
    """Steps an optimizer of PyTorch on the device on which JAX steps its own."""

    def __init__(self, optimizer: Any, compiled: bool, data: Data):
        self._torch: Any = importlib.import_module("torch")
        # As many as XLA uses.
        self._torch.set_num_threads(os.cpu_count() or 1)
        self._device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self._params = {
            name: self._torch.nn.Parameter(value) for name, value in self._on_device(data.params())
        }
        self._sets = [
            [value for _, value in self._on_device(data.gradients(i))] for i in range(data.sets)
        ]
        self._optimizer = optimizer(self._params.values())
        step = self._optimizer.step
        self._step = self._torch.compile(step) if compiled else step
        self.prepare(0)

    def _on_device(self, leaves: Leaves) -> Any:
        for name, value in leaves:
            # A copy, because NumPy's memory is part of a longer array.
            yield name, self._torch.from_numpy(value).to(self._device, copy=True)

    def prepare(self, index: int) -> None:
        """Sets the gradients, as `backward` does."""
        gradients = self._sets[index % len(self._sets)]
        for param, gradient in zip(self._params.values(), gradients, strict=True):
            param.grad = gradient

    def step(self) -> None:
        """Takes one step; on a GPU, starts it."""
        self._step()

    def block(self) -> None:
        """Waits for the GPU; a CPU is done when `step` returns."""
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def state_bytes(self) -> int:
        """Bytes of all tensors of the state."""
        return sum(
            value.numel() * value.element_size()
            for state in self._optimizer.state.values()
            for value in state.values()
            if self._torch.is_tensor(value)
        )

    def params(self) -> dict[str, np.ndarray]:
        """The parameters as they are now."""
        return {name: p.detach().cpu().numpy() for name, p in self._params.items()}

    def analysis(self) -> dict[str, float]:
        """Nothing: PyTorch does not report any."""
        return {}

    def device_peak(self) -> int | None:
        """Peak bytes that PyTorch used on the GPU."""
        return self._torch.cuda.max_memory_allocated() if self._device == "cuda" else None


class Optimizer:
    """An optimizer of PyTorch.

    Args:
        foreach: of `torch.optim.Adamax`: lists of tensors at a time, or a loop over them.
        compiled: whether `torch.compile` makes one program of its step.
        third_party: pytorch_optimizer's AdaMax instead, whose decay is decoupled.
    """

    def __init__(self, *, foreach: bool = False, compiled: bool = False, third_party: bool = False):
        self._foreach, self._compiled, self._third_party = foreach, compiled, third_party

    def _optimizer(self, params: Any) -> Any:
        options: dict[str, Any] = {
            "lr": LEARNING_RATE,
            "betas": (B1, B2),
            "eps": EPS,
            "weight_decay": WEIGHT_DECAY,
        }
        if self._third_party:
            module: Any = importlib.import_module("pytorch_optimizer")
            return module.AdaMax(params, **options, weight_decouple=True)
        module = importlib.import_module("torch")
        return module.optim.Adamax(params, **options, foreach=self._foreach)

    def build(self, data: Data) -> TorchRunner:
        """With parameters and gradients; the state is made by the first step."""
        return TorchRunner(self._optimizer, self._compiled, data)

    def eager(self, data: Data) -> TorchRunner:
        """Not available: the update is not separate from its application."""
        raise NotImplementedError("PyTorch has no update without its application")

    def compile_times(self, tree: Shapes, dtype: str) -> dict[str, float]:
        """Seconds of the first two steps minus those of two later ones.

        The second step compiles again: the first one made the state.
        """
        runner = self.build(Data(tree, dtype, sets=1))
        seconds = []
        for _ in range(2):
            begin = time.perf_counter()
            for _ in range(2):
                runner.step()
            runner.block()
            seconds.append(time.perf_counter() - begin)
        return {"trace": 0.0, "compile": seconds[0] - seconds[1]}
