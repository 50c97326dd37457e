"""Every contender by name, what it needs, and how it is built.

Parameters, gradients and hyperparameters are the same for all. Nothing heavy is imported here: the
process that starts the measuring ones stays small.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from runners import B1, B2, EPS, LEARNING_RATE, WEIGHT_DECAY, Implementation


@dataclasses.dataclass(frozen=True)
class Contender:
    """One optimizer in one configuration.

    Attributes:
        name: in tables and on the command line.
        packages: packages that it imports.
        make: creates the implementation.
        dtype: of parameters and gradients.
        state_bytes: bytes per parameter, to judge what fits in memory; results are measured.
        working_bytes: bytes of temporaries per parameter, likewise.
        rule: "adamaxw", "adamw", or "L2" (Adamax with decay added to the gradients).
        compiles: whether it is compiled.
        eager: whether its update can be called without jit.
    """

    name: str
    packages: tuple[str, ...]
    make: Callable[[], Implementation]
    dtype: str = "float32"
    state_bytes: int = 8
    working_bytes: int = 0
    rule: str = "adamaxw"
    compiles: bool = True
    eager: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} not installed" if absent else None

    def bytes_per_parameter(self, sets: int) -> int:
        """Rough memory of a runner: parameters, gradients, state, temporaries."""
        item = 2 if self.dtype == "bfloat16" else 4
        return item * (1 + sets) + self.state_bytes + self.working_bytes


def _optax(name: str) -> Callable[[], Implementation]:
    def make() -> Implementation:
        import jax_contenders
        import optax

        opt = getattr(optax, name)(LEARNING_RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY)
        return jax_contenders.Transformation(opt)

    return make


def _ours(moment_dtype: str | None, rounding: str) -> Callable[[], Implementation]:
    def make() -> Implementation:
        import jax_contenders

        import adamaxw

        opt = adamaxw.adamaxw(
            LEARNING_RATE,
            B1,
            B2,
            EPS,
            weight_decay=WEIGHT_DECAY,
            moment_dtype=moment_dtype,
            param_rounding=rounding,
        )
        return jax_contenders.Transformation(opt)

    return make


def _keras() -> Implementation:
    import keras_contender

    return keras_contender.Adamax()


def _torch(**options: Any) -> Callable[[], Implementation]:
    def make() -> Implementation:
        import torch_contenders

        return torch_contenders.Optimizer(**options)

    return make


def _all() -> Iterable[Contender]:
    yield Contender("optax.adamaxw", (), _optax("adamaxw"), eager=True)
    yield Contender("optax.adamw", (), _optax("adamw"), rule="adamw", eager=True)
    yield Contender("optax.adamaxw, bfloat16", (), _optax("adamaxw"), "bfloat16", 4, eager=True)
    moments = {"float32": (None, 8), "bfloat16": ("bfloat16", 4), "uint8": ("uint8", 2)}
    for name, (moment_dtype, size) in moments.items():
        yield Contender(
            f"adamaxw float32, moments {name}",
            (),
            _ours(moment_dtype, "nearest"),
            state_bytes=size,
            eager=True,
        )
    for rounding, extra in (("nearest", 0), ("stochastic", 0), ("exact", 2)):
        for name, (moment_dtype, size) in moments.items():
            yield Contender(
                f"adamaxw bfloat16 {rounding}, moments {name}",
                (),
                _ours(moment_dtype, rounding),
                "bfloat16",
                size + extra,
                eager=True,
            )
    torch = ("torch",)
    adamax = "torch.optim.Adamax"
    yield Contender(
        f"{adamax}, loop", torch, _torch(foreach=False), working_bytes=4, rule="L2", compiles=False
    )
    # Two lists of tensors as large as the gradients: the decayed gradients, and absolute values.
    yield Contender(
        f"{adamax}, foreach",
        torch,
        _torch(foreach=True),
        working_bytes=8,
        rule="L2",
        compiles=False,
    )
    yield Contender(f"{adamax}, compiled", torch, _torch(foreach=True, compiled=True), rule="L2")
    yield Contender("keras.optimizers.Adamax", ("keras",), _keras)
    yield Contender(
        "pytorch_optimizer.AdaMax",
        ("torch", "pytorch_optimizer"),
        _torch(third_party=True),
        working_bytes=4,
        compiles=False,
    )


CONTENDERS = {contender.name: contender for contender in _all()}
REFERENCE = CONTENDERS["optax.adamaxw"]


def matching(patterns: Iterable[str]) -> list[str]:
    """Names that contain one of the patterns, in the order of the tables.

    Raises:
        ValueError: a pattern is in no name.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in CONTENDERS if pattern in name}
        if not found:
            raise ValueError(f"no contender contains {pattern!r}: have {'; '.join(CONTENDERS)}")
        chosen |= found
    return [name for name in CONTENDERS if name in chosen]
