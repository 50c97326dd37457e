"""What every contender is given, and what it must be able to do."""

from typing import Protocol

import numpy as np
from trees import Data, Shapes

LEARNING_RATE = 1e-3
B1, B2 = 0.9, 0.999
EPS = 1e-8
WEIGHT_DECAY = 1e-2


class Runner(Protocol):
    """An optimizer with parameters, state and sets of gradients, ready to step."""

    def prepare(self, index: int) -> None:
        """Chooses the set of gradients of the steps to come; not timed."""
        ...

    def step(self) -> None:
        """Starts one step."""
        ...

    def block(self) -> None:
        """Waits until the steps are done."""
        ...

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        ...

    def params(self) -> dict[str, np.ndarray]:
        """The parameters as they are now."""
        ...

    def analysis(self) -> dict[str, float]:
        """What the compiler says of the step: "program_bytes", "temporaries"; else empty."""
        ...

    def device_peak(self) -> int | None:
        """Most bytes that were in use on an accelerator; None on a CPU."""
        ...


class Implementation(Protocol):
    """How a contender is built."""

    def build(self, data: Data) -> Runner:
        """With parameters, gradients and a fresh state."""
        ...

    def eager(self, data: Data) -> Runner:
        """Likewise, but each step is the update alone, without jit."""
        ...

    def compile_times(self, tree: Shapes, dtype: str) -> dict[str, float]:
        """Seconds of "trace" (with lowering; 0 where it is not apart) and "compile"."""
        ...
