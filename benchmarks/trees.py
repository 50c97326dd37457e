"""The trees of parameters that are measured, and the values in them."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

FILE = Path(__file__).parent / "parameter_trees.json"
LEAF = "leaf-"
# PyTorch and Equinox have the kernel's height and width last, Flax has them first.
KERNELS_FIRST = "-hwio"
# Values are drawn once and repeated: drawing a billion would take longer than all steps.
_BLOCK = 2**20

Shapes = dict[str, tuple[int, ...]]
Leaves = Iterator[tuple[str, np.ndarray]]


def stated() -> dict[str, tuple[int, int]]:
    """Numbers of leaves and parameters that the file states, per model."""
    return {
        name: (tree["leaves"], tree["parameters"])
        for name, tree in json.loads(FILE.read_text()).items()
    }


def shapes(name: str) -> Shapes:
    """Shapes of the leaves of a model in the file, or of the single leaf `leaf-<n>`.

    Args:
        name: of the tree; n is the number of parameters, such as 1000 or 1e6. With `-hwio` at its
            end, leaves of rank 4, (out, in, height, width), are (height, width, in, out).

    Raises:
        ValueError: no tree has the name.
    """
    if name.startswith(LEAF):
        return {"leaf": (_size(name),)}
    models = json.loads(FILE.read_text())
    model = name.removesuffix(KERNELS_FIRST)
    if model not in models:
        raise ValueError(
            f"no tree {name!r}: have {', '.join(models)}, with or without {KERNELS_FIRST}, and "
            f"{LEAF}<n>"
        )
    counted = [tuple(shape) for shape, count in models[model]["shapes"] for _ in range(count)]
    if name != model:
        counted = [(*s[2:], s[1], s[0]) if len(s) == 4 else s for s in counted]
    return {f"{i:04}": shape for i, shape in enumerate(counted)}


def _size(name: str) -> int:
    try:
        size = int(float(name.removeprefix(LEAF)))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"{name!r}: a leaf is {LEAF}<n> with a number n of parameters, at least 1")
    return size


def count(tree: Shapes) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in tree.values())


@dataclasses.dataclass(frozen=True)
class Data:
    """Reproducible parameters and gradients of a tree.

    Leaves come one by one, so that never more than one is in memory besides those of the optimizer.

    Attributes:
        tree: shapes of the leaves.
        dtype: "float32" or "bfloat16", of parameters and gradients.
        sets: how many sets of gradients alternate.
        scale: standard deviation of the parameters.
    """

    tree: Shapes
    dtype: str = "float32"
    sets: int = 2
    scale: float = 1.0

    def params(self) -> Leaves:
        """Names and values of the parameters, normally distributed."""
        return self._leaves(0, self.scale)

    def gradients(self, index: int) -> Leaves:
        """Names and values of one set of gradients, normally distributed."""
        return self._leaves(index + 1, 1.0)

    def _leaves(self, seed: int, scale: float) -> Leaves:
        largest = max(math.prod(shape) for shape in self.tree.values())
        rng = np.random.default_rng(seed)
        block = scale * rng.standard_normal(min(_BLOCK, largest), np.float32)
        dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32
        block = block.astype(dtype)
        for name, shape in self.tree.items():
            yield name, np.resize(block[: math.prod(shape)], shape)
