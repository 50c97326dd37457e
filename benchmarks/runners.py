"""What every contender is given, and the interface it implements."""

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
        """Chooses the set of gradients for the next steps; not timed."""
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
        """The compiler's figures for the step, "program_bytes" and "temporaries", if it has any."""
        ...

    def device_peak(self) -> int | None:
        """Peak bytes in use on an accelerator; None on a CPU."""
        ...


class Implementation(Protocol):
    """How a contender is built."""

    def build(self, data: Data) -> Runner:
        """A runner with parameters, gradients and a fresh state."""
        ...

    def eager(self, data: Data) -> Runner:
        """Likewise, but a step is the update alone, without jit."""
        ...

    def compile_times(self, tree: Shapes, dtype: str) -> dict[str, float]:
        """Seconds of "trace" (with lowering; 0 if it is not separate) and "compile"."""
        ...
