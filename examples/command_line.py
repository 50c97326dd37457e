"""The shared command line of the examples: flags of the optimizer, errors in one line."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import optax

import adamaxw

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamaxw": adamaxw.adamaxw,
    "optax.adamaxw": optax.adamaxw,
    "optax.adamw": optax.adamw,
}


class Parser(argparse.ArgumentParser):
    """A parser with the common flags, which reports errors in one line."""

    def __init__(self, description: str, learning_rate: float, weight_decay: float, output: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.add_argument("--optimizer", choices=OPTIMIZERS, default="adamaxw", help="which one")
        self.add_argument("--learning-rate", type=rate, default=learning_rate, help="at its peak")
        self.add_argument("--weight-decay", type=rate, default=weight_decay, help="of matrices")
        self.add_argument(
            "--seed",
            type=integer_in(0, 2**32 - 1),
            default=0,
            help="of everything random",
        )
        self.add_argument(
            "--output", type=Path, default=Path(output), help="folder for what is written"
        )

    def add_low_precision(self) -> None:
        """Adds the flags for how `adamaxw` stores moments and rounds parameters."""
        self.add_argument(
            "--moments",
            choices=("float32", "bfloat16", "uint8"),
            default="float32",
            help="how adamaxw stores the moments",
        )
        self.add_argument(
            "--rounding",
            choices=("nearest", "stochastic", "exact"),
            default="nearest",
            help="how adamaxw rounds bfloat16 parameters",
        )

    def low_precision(self, args: argparse.Namespace) -> dict[str, Any]:
        """The flags of `add_low_precision` as arguments of `adamaxw`, the only one to take them."""
        if args.optimizer != "adamaxw":
            for flag, value in (("--moments", args.moments), ("--rounding", args.rounding)):
                if value != self.get_default(flag[2:]):
                    self.error(f"argument {flag}: only with --optimizer adamaxw")
            return {}
        moments = None if args.moments == "float32" else args.moments
        return {"moment_dtype": moments, "param_rounding": args.rounding}

    def error(self, message: str) -> NoReturn:
        """Exits with status 2, without the usage."""
        self.fail(message, status=2)

    def fail(self, message: str, status: int = 1) -> NoReturn:
        """Exits with one line on stderr."""
        self.exit(status, f"{self.prog}: error: {message}\n")

    def folder(self, path: Path) -> None:
        """Makes the output folder, unless it exists; failing to is an error of --output."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --output: {path}: {error.strerror}")


def bytes_per_parameter(tree: Any, parameters: int) -> float:
    """Bytes of all arrays in a tree, per parameter."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / parameters


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
