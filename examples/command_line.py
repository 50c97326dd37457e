"""What the command lines of the examples share: flags of the optimizer, errors in one line."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import optax

import adamaxw

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamaxw": adamaxw.adamaxw,
    "optax.adamaxw": optax.adamaxw,
    "optax.adamw": optax.adamw,
}


class Parser(argparse.ArgumentParser):
    """A parser with the flags of every example, that says what is wrong in one line."""

    def __init__(self, description: str, learning_rate: float, weight_decay: float, output: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.add_argument("--optimizer", choices=OPTIMIZERS, default="adamaxw", help="which one")
        self.add_argument("--learning-rate", type=rate, default=learning_rate, help="at its peak")
        self.add_argument("--weight-decay", type=rate, default=weight_decay, help="of matrices")
        self.add_argument("--seed", type=integer_in(0, 2**32 - 1), default=0, help="of all chance")
        self.add_argument(
            "--output", type=Path, default=Path(output), help="folder for the picture"
        )

    def error(self, message: str) -> NoReturn:
        """Exits with status 2, without the usage."""
        self.fail(message, status=2)

    def fail(self, message: str, status: int = 1) -> NoReturn:
        """Exits with one line on stderr."""
        self.exit(status, f"{self.prog}: error: {message}\n")

    def folder(self, path: Path) -> None:
        """Makes the folder for the output where it is not yet there; what hinders is an error."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --output: {path}: {error.strerror}")


def rate(text: str) -> float:
    """A type for argparse: a finite number that is not negative."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and at least 0, got {text}")
    return float(text)


def integer_in(low: int, high: int) -> Callable[[str], int]:
    """A type for argparse: an integer from `low` to `high`."""

    def integer(text: str) -> int:
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return int(text)

    return integer
