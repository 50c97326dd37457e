"""Which parameters decay: masks to pass to `adamaxw.adamaxw`, and a table of what they choose.

Each is a function from params to a tree of booleans, as `mask` of `adamaxw.adamaxw` and of
`optax.masked` may be. They look at shapes and paths alone, so that they work on arrays, abstract
arrays, and the states of Flax NNX, whose Variables count as leaves. For them
`optax.inject_hyperparams(adamaxw.adamaxw)` needs no `static_args`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamaxw import _leaves, _masking, _paths
from adamaxw._table import Table


class Mask(ABC):
    """A function from params to booleans that combines with others: `a & b`, `a | b`, `~a`.

    Called with a tree, it returns the tree with a bool in place of each leaf. The other operand of
    `&` and `|` may be any function that is valid as a mask. Masks made alike are equal, and
    hashable.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamaxw import masks
        >>> params = {"embed": jnp.ones((8, 2)), "dense": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}}
        >>> mask = masks.matrices & ~masks.matching("embed")
        >>> mask(params)
        {'dense': {'b': False, 'w': True}, 'embed': False}
        >>> mask
        masks.rank(2) & ~masks.matching('embed')
    """

    def __call__(self, params: Any) -> Any:
        """Which leaves of `params` are chosen.

        Args:
            params: any tree. A lone integer scalar is the count with which
                `optax.inject_hyperparams` calls what it takes for a schedule: the mask returns
                itself, in a form that the state of that wrapper can hold.
        """
        if _is_count(params):
            return _Injected(self)
        return jax.tree.structure(_paths.pure(params)).unflatten(self.flags_of(params))

    def __and__(self, other: Callable[[Any], Any]) -> "Mask":
        return _combine("&", self, other)

    def __or__(self, other: Callable[[Any], Any]) -> "Mask":
        return _combine("|", self, other)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> "Mask":
        return _Combined("~", (self,))

    def __bool__(self) -> bool:
        raise TypeError("masks combine with &, | and ~, not with and, or and not")

    @abstractmethod
    def flags_of(self, params: Any) -> list[bool]:
        """A boolean for each leaf."""


def rank(minimum: int) -> Mask:
    """Chooses the leaves of at least `minimum` dimensions.

    Layers that are stacked, for `jax.lax.scan` or `jax.vmap` over them, have a dimension more:
    their biases have rank 2.

    Args:
        minimum: the least rank, not negative.

    Raises:
        TypeError: `minimum` is no integer.
        ValueError: it is negative.
    """
    if isinstance(minimum, bool) or not isinstance(minimum, (int, np.integer)):
        raise TypeError(f"minimum must be an integer, got {minimum!r}")
    if minimum < 0:
        raise ValueError(f"minimum must be at least 0, got {minimum}")
    return _Rank(int(minimum))


def matching(include: str | Sequence[str] = "", exclude: str | Sequence[str] = ()) -> Mask:
    r"""Chooses leaves by their paths: those that `include` matches and `exclude` does not.

    Args:
        include: a regular expression, searched for in the path of a leaf, whose keys are joined
            with `/`, such as `blocks/0/norm/scale`; or a sequence of them, of which one must be
            found. `""` is found in every path; `^` and `$` match the ends of a path.
        exclude: likewise; none of them may be found.

    Returns:
        The mask. When it is called, a pattern that is found in no path is a ValueError which names
        some paths that there are; a tree without leaves has nothing to be found.

    Raises:
        TypeError: a pattern is no string.
        ValueError: a pattern is no regular expression, or `include` is empty.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamaxw import masks
        >>> params = {"w": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
        >>> masks.matching(exclude=["^bias$", "scale"])(params)
        {'bias': False, 'scale': False, 'w': True}
    """
    includes = _patterns("include", include)
    if not includes:
        raise ValueError("include must have at least one pattern; the default matches every path")
    return _Matching(includes, _patterns("exclude", exclude))


def describe(params: Any, mask: Any = None) -> Table:
    """A table of the leaves of `params`: which of them decay, and how many parameters those are.

    Args:
        params: any tree of arrays; abstract ones will do.
        mask: as in `adamaxw.adamaxw`.

    Returns:
        A table with the path, shape, dtype, number of parameters, and whether it decays, of each
        leaf, and with totals. `print` shows it as text, `rich.print` with rules.

    Raises:
        TypeError, ValueError: as from the `init` of `adamaxw.adamaxw`: a leaf is no array of
            numbers, or the mask is not boolean or does not have the structure of params.

    Examples:
        >>> import jax.numpy as jnp
        >>> from adamaxw import masks
        >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
        >>> print(masks.describe(params, masks.matrices))
        path            shape   dtype    parameters  decays
        bias            (2,)    float32           2  no
        kernel          (3, 2)  float32           6  yes
        decays                                    6
        does not decay                            2
        total                                     8
    """
    decays = _masking.resolve_mask(mask, params)
    rows, totals = [], {True: 0, False: 0}
    for (path, p), decay in zip(_paths.named(params), decays, strict=True):
        p = _leaves.as_array(p)
        if not _leaves.is_numeric(p):
            raise TypeError(
                f"params must be arrays of numbers, got {_leaves.describe(p)} at {path!r}; filter "
                "such leaves out, with None in their place"
            )
        dtype = jnp.result_type(p)
        # What does not train does not decay.
        decay = decay and jnp.issubdtype(dtype, jnp.inexact)
        size = int(np.prod(np.shape(p), dtype=object))
        rows.append((path, str(np.shape(p)), str(dtype), f"{size:,}", "yes" if decay else "no"))
        totals[decay] += size
    return Table(
        columns=("path", "shape", "dtype", "parameters", "decays"),
        rows=tuple(rows),
        footer=(
            ("decays", "", "", f"{totals[True]:,}", ""),
            ("does not decay", "", "", f"{totals[False]:,}", ""),
            ("total", "", "", f"{sum(totals.values()):,}", ""),
        ),
        right=("parameters",),
    )


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Injected:
    """A mask as a tree without leaves; a `Mask` itself is one leaf, as Optax wants functions."""

    mask: Mask

    def __call__(self, params: Any) -> Any:
        return self.mask(params)

    def flags_of(self, params: Any) -> list[bool]:
        return self.mask.flags_of(params)


@dataclass(frozen=True)
class _Rank(Mask):
    minimum: int

    def __repr__(self) -> str:
        return f"masks.rank({self.minimum})"

    def flags_of(self, params: Any) -> list[bool]:
        return [np.ndim(leaf) >= self.minimum for leaf in jax.tree.leaves(_paths.pure(params))]


@dataclass(frozen=True)
class _Matching(Mask):
    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]

    def __repr__(self) -> str:
        arguments = (self.include, "include"), (self.exclude, "exclude")
        shown = [
            f"{name}={[p.pattern for p in patterns]}" for patterns, name in arguments if patterns
        ]
        if not self.exclude and len(self.include) == 1:
            shown = [repr(self.include[0].pattern)]
        return f"masks.matching({', '.join(shown)})"

    def flags_of(self, params: Any) -> list[bool]:
        paths = [path for path, _ in _paths.named(params)]
        for pattern in (*self.include, *self.exclude):
            if paths and not any(map(pattern.search, paths)):
                raise ValueError(
                    f"{self}: the pattern {pattern.pattern!r} matches no path of params, which are "
                    f"such as {', '.join(paths[:5])}"
                )
        return [
            any(pattern.search(path) for pattern in self.include)
            and not any(pattern.search(path) for pattern in self.exclude)
            for path in paths
        ]


@dataclass(frozen=True)
class _Combined(Mask):
    """`a & b & c`, `a | b | c` or `~a`, by its `symbol`."""

    symbol: str
    masks: tuple[Mask, ...]

    def __repr__(self) -> str:
        shown = [
            f"({mask})" if isinstance(mask, _Combined) and mask.symbol != "~" else f"{mask}"
            for mask in self.masks
        ]
        return f"~{shown[0]}" if self.symbol == "~" else f" {self.symbol} ".join(shown)

    def flags_of(self, params: Any) -> list[bool]:
        combine = {"&": all, "|": any, "~": lambda leaf: not leaf[0]}[self.symbol]
        chosen = (mask.flags_of(params) for mask in self.masks)
        return list(map(combine, zip(*chosen, strict=True)))


@dataclass(frozen=True)
class _Function(Mask):
    function: Callable[[Any], Any]

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))

    def flags_of(self, params: Any) -> list[bool]:
        return list(_masking.resolve_mask(self.function, params))


matrices = rank(2)
"""The mask of matrices: `rank(2)`. Biases, and the scales of norms, do not decay."""


def _is_count(params: Any) -> bool:
    is_scalar = isinstance(params, jax.Array) and params.shape == ()
    return is_scalar and jnp.issubdtype(params.dtype, jnp.integer)


def _combine(symbol: str, *operands: Any) -> Any:
    if not all(map(callable, operands)):
        return NotImplemented
    masks: list[Mask] = []
    for operand in operands:
        if isinstance(operand, _Combined) and operand.symbol == symbol:
            masks += operand.masks
        else:
            masks.append(operand if isinstance(operand, Mask) else _Function(operand))
    return _Combined(symbol, tuple(masks))


def _patterns(name: str, patterns: Any) -> tuple[re.Pattern[str], ...]:
    if isinstance(patterns, str):
        patterns = (patterns,)
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{name} must be a string or a sequence of strings, got {patterns!r}")
    try:
        return tuple(map(re.compile, patterns))
    except re.error as error:
        raise ValueError(
            f"{name} has {error.pattern!r}, which is no regular expression: {error}"
        ) from None
