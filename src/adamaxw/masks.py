"""Which parameters decay: ready masks for `adamaxw.adamaxw`, and a table of what they choose.

Each is a function from params to a tree of booleans, as `mask` of `adamaxw.adamaxw` and of
`optax.masked` may be. They look only at shapes and paths, so they work on arrays, abstract arrays
and the states of Flax NNX, whose Variables count as leaves. With them,
`optax.inject_hyperparams(adamaxw.adamaxw)` needs no `static_args`.
"""

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import keystr, tree_leaves_with_path

from adamaxw import _checks, _paths
from adamaxw._table import Table

__all__ = ["Mask", "describe", "matching", "matrices", "rank"]

_INJECTED = (
    ". optax.inject_hyperparams calls a callable mask as a schedule, with the count in place of "
    "params: prevent that with static_args=('mask',), or use a mask of adamaxw.masks"
)


class Mask(ABC):
    """A function from params to booleans that combines with others: `a & b`, `a | b`, `~a`.

    Called with a tree, it returns the tree with a bool in place of each leaf. The other operand may
    be any function that is a valid mask. Masks made from equal arguments are equal.

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
        """Which leaves of `params`, any tree, are chosen."""
        is_scalar = isinstance(params, jax.Array) and params.shape == ()
        if is_scalar and jnp.issubdtype(params.dtype, jnp.integer):
            # optax.inject_hyperparams takes any callable for a schedule and passes it the count.
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
        """One boolean per leaf."""


def rank(minimum: int) -> Mask:
    """Chooses the leaves of at least `minimum` dimensions.

    Layers that are stacked for `jax.lax.scan` or `jax.vmap` have one dimension more: their biases
    have rank 2.
    """
    return _Rank(operator.index(minimum))


def matching(include: str | Sequence[str] = "", exclude: str | Sequence[str] = ()) -> Mask:
    r"""Chooses leaves by their paths: those that `include` matches and `exclude` does not.

    Args:
        include: a regular expression that is searched for in the path of a leaf, whose keys are
            joined with `/` as in `blocks/0/norm/scale`; or a sequence, of which one must be found.
            `""` is found in every path; `^` and `$` match the ends of a path.
        exclude: likewise; none of them may be found.

    Returns:
        The mask; called with a tree that has leaves, it raises a ValueError if a pattern is found
        in no path.
    """
    if include != "" and not include:
        raise ValueError("include must have at least one pattern; the default matches every path")
    each = ((x,) if isinstance(x, str) else x for x in (include, exclude))
    return _Matching(*(tuple(map(re.compile, patterns)) for patterns in each))


def describe(params: Any, mask: Any = None) -> Table:
    """A table of the leaves of `params`: which of them decay, and how many parameters those have.

    Args:
        params: any tree of arrays, which may be abstract.
        mask: as in `adamaxw.adamaxw`.

    Returns:
        A table for `print` or `rich.print`, with totals.

    Raises:
        TypeError, ValueError: the mask is not boolean, or not a prefix of params.

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
    rows, totals = [], {True: 0, False: 0}
    for (path, p), decays in zip(
        _paths.named_leaves(params), resolve_mask(mask, params), strict=True
    ):
        shape, dtype = np.shape(p), jnp.result_type(p)
        decays = decays and jnp.issubdtype(dtype, jnp.inexact)  # integers do not train
        size = int(np.prod(shape, dtype=object))
        rows.append((path, str(shape), str(dtype), f"{size:,}", "yes" if decays else "no"))
        totals[decays] += size
    sums = {"decays": totals[True], "does not decay": totals[False], "total": sum(totals.values())}
    return Table(
        columns=("path", "shape", "dtype", "parameters", "decays"),
        rows=tuple(rows),
        footer=tuple((name, "", "", f"{total:,}", "") for name, total in sums.items()),
        right=("parameters",),
    )


def refuse_called_mask(mask: Any, hyperparameters: tuple[Any, ...]) -> None:
    """Raises a TypeError for a lone boolean beside hyperparameters that are arrays."""
    # `optax.inject_hyperparams` calls a callable mask with the count: `p.ndim > 1` is then False,
    # so nothing decays. A user's own boolean is valid; array hyperparameters tell the two apart.
    is_boolean = isinstance(mask, (bool, np.bool_))
    if is_boolean and any(isinstance(value, jax.Array) for value in hyperparameters):
        raise TypeError(
            f"mask={mask} beside hyperparameters that are arrays may be a callable mask, called by "
            f"mistake: pass mask=None to decay all leaves, weight_decay=0 for none{_INJECTED}"
        )


def resolve_mask(mask: Any, params: optax.Params) -> tuple[bool, ...]:
    """Which leaves of `params` decay, one boolean per leaf; `mask` as in `adamaxw.adamaxw`."""
    mask = True if mask is None else mask.mask if isinstance(mask, _Injected) else mask
    if isinstance(mask, Mask):
        return tuple(mask.flags_of(params))
    # A module with a __call__ can also be the tree: then it has boolean leaves.
    if callable(mask) and not any(map(_is_boolean, jax.tree.leaves(mask))):
        mask = mask(params)
    # Flax NNX gives params with Variables to init and without them to update.
    mask, params = _paths.pure(mask), _paths.pure(params)
    flags = tree_leaves_with_path(mask)
    for path, flag in flags:
        if not _is_boolean(flag) or isinstance(flag, Tracer):
            # A function that was called by mistake leaves one value in place of the whole tree.
            raise TypeError(
                f"mask{keystr(path)} must be a boolean, known when the step is compiled, got "
                f"{_checks.in_words(flag)}{'' if path else _INJECTED}"
            )
    subtrees = _checks.check_prefix("mask", mask, "params", params)
    pairs = zip(flags, subtrees, strict=True)
    return tuple(bool(flag) for (_, flag), tree in pairs for _ in jax.tree.leaves(tree))


def _is_boolean(leaf: Any) -> bool:
    is_array = isinstance(leaf, (np.ndarray, np.generic, jax.Array))
    return isinstance(leaf, bool) or (is_array and _checks.is_array(leaf, np.bool_))


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Injected:
    """Wraps a mask as a pytree without leaves, so `inject_hyperparams` can keep it in its state."""

    mask: Mask

    def __call__(self, params: Any) -> Any:
        return self.mask(params)


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
        include, exclude = ([p.pattern for p in each] for each in (self.include, self.exclude))
        shown = f"include={include}" if exclude or len(include) != 1 else repr(include[0])
        return f"masks.matching({shown}{f', exclude={exclude}' if exclude else ''})"

    def flags_of(self, params: Any) -> list[bool]:
        paths = [path for path, _ in _paths.named_leaves(params)]
        for pattern in (*self.include, *self.exclude):
            if paths and not any(map(pattern.search, paths)):
                raise ValueError(
                    f"{self}: the pattern {pattern.pattern!r} matches no path of params, such as "
                    + ", ".join(paths[:5])
                )

        def is_found(patterns: tuple[re.Pattern[str], ...], path: str) -> bool:
            return any(pattern.search(path) for pattern in patterns)

        return [is_found(self.include, p) and not is_found(self.exclude, p) for p in paths]


@dataclass(frozen=True)
class _Combined(Mask):
    """`a & b & c`, `a | b | c` or `~a` by its `symbol`, of masks and functions."""

    symbol: str
    masks: tuple[Callable[[Any], Any], ...]

    def __repr__(self) -> str:
        shown = []
        for mask in self.masks:
            text = getattr(mask, "__name__", repr(mask))
            is_chain = isinstance(mask, _Combined) and mask.symbol != "~"
            shown.append(f"({text})" if is_chain else text)
        return f"~{shown[0]}" if self.symbol == "~" else f" {self.symbol} ".join(shown)

    def flags_of(self, params: Any) -> list[bool]:
        combine = {"&": all, "|": any, "~": lambda leaf: not leaf[0]}[self.symbol]
        chosen = (resolve_mask(mask, params) for mask in self.masks)
        return list(map(combine, zip(*chosen, strict=True)))


def _combine(symbol: str, *operands: Any) -> Any:
    if not all(map(callable, operands)):
        return NotImplemented
    masks = []
    for operand in operands:
        is_same = isinstance(operand, _Combined) and operand.symbol == symbol
        masks += operand.masks if is_same else [operand]
    return _Combined(symbol, tuple(masks))


matrices = rank(2)
"""The mask of matrices: `rank(2)`. Biases and the scales of norms do not decay."""
