"""The state of `torch.optim.Adamax`, read from arrays: no PyTorch, nothing unpickled."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamaxw import _formats, _leaves, _paths, _places


def read(
    state: Mapping[str, Any],
    params: Any,
    names: Mapping[str, int | str | None],
    transposes: Mapping[str, tuple[int, ...]],
) -> tuple[Any, Any, Any]:
    """The count and the two trees of moments; see `moments.from_torch`."""
    leaves = dict(_paths.named(params))
    for argument, given in (("names", names), ("transposes", transposes)):
        unknown = [path for path in given if path not in leaves]
        if unknown:
            raise ValueError(f"{argument} has no leaf of params for {unknown}: {_listed(leaves)}")
    slots, numbers = _slots(state), _numbers(state)
    used: dict[str, str] = {}
    steps: dict[int, str] = {}
    rows: list[Any] = []
    for path, leaf in leaves.items():
        _check_array(f"params {path!r}", leaf)
        trains = jnp.issubdtype(leaf.dtype, jnp.inexact)
        if trains and path not in names:
            raise ValueError(f"names must say which parameter is {path!r}, or None for no state")
        name = names.get(path)
        if name is None:
            dtypes = _formats.WIDE.dtypes(leaf.dtype) if trains else (leaf.dtype,) * 2
            moments = [np.zeros(leaf.shape, dtype) for dtype in dtypes]
        else:
            key = numbers.get(name, str(name))
            if key not in slots:
                raise ValueError(
                    f"names has {name!r} for {path!r}, which state does not have: "
                    f"{_listed([*slots, *numbers])}. Give None for a parameter that never had a "
                    "gradient"
                )
            if key in used:
                raise ValueError(f"names has {name!r} for both {used[key]!r} and {path!r}")
            used[key] = path
            step, *moments = _parameter(f"state of {name!r}", slots[key])
            steps.setdefault(step, path)
            moments = [_fitted(x, leaf, path, name, transposes.get(path)) for x in moments]
        place = _places.concrete(leaf.sharding) if _places.is_placed(leaf) else None
        rows.append([jax.device_put(x, place) for x in moments])
    unused = [key for key in slots if key not in used]
    if unused:
        raise ValueError(
            f"names has no leaf of params for {unused} of state: leave them out of state if they "
            "are not to be used"
        )
    if len(steps) > 1:
        raise ValueError(
            "all parameters must have done the same number of steps, got "
            + ", ".join(f"{step} for {path!r}" for step, path in steps.items())
            + ". Call from_torch for each number of steps, on those parameters alone, and give "
            "each its own optimizer by optax.partition"
        )
    count = jnp.int32(min(max(steps, default=0), 2**31 - 1))
    return count, *_leaves.columns(jax.tree.structure(params), rows, 2)


def _slots(state: Mapping[str, Any]) -> dict[str, Any]:
    """The slots of each parameter, by its number or name."""
    if "state" in state:
        return {str(key): slots for key, slots in state["state"].items()}
    found: dict[str, Any] = {}
    for key, value in state.items():
        parts = re.fullmatch(r"state\.(.+)\.(.+)", str(key))
        if parts is None:
            raise ValueError(
                f'state has the key {key!r}, where "state.0.exp_avg" or '
                '"state.dense.weight.exp_avg" was expected'
            )
        name, slot = parts.groups()
        found.setdefault(name, {})[slot] = value
    return found


def _numbers(state: Mapping[str, Any]) -> dict[Any, str]:
    """The numbers of parameters by name, where the optimizer was given `named_parameters()`."""
    return {
        name: str(number)
        for group in state.get("param_groups", ())
        for name, number in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def _parameter(name: str, slots: Mapping[str, Any]) -> tuple[int, np.ndarray, np.ndarray]:
    """The step and the two moments of one parameter."""
    if "exp_avg_sq" in slots:
        raise ValueError(
            f"{name} has exp_avg_sq, as Adam keeps it, an average of squares: no infinity norm can "
            "be made of it. Go on with the state of init, and warm the learning rate up"
        )
    wanted = ("step", "exp_avg", "exp_inf")
    missing = [slot for slot in wanted if slot not in slots]
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(missing)}, but {_listed(slots)}")
    arrays = []
    for slot in wanted:
        x = slots[slot]
        x = np.asarray(x) if isinstance(x, (int, float)) else x
        _check_array(f"{slot} in {name}", x)
        if slot != "step" and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{slot} in {name} must be real floating numbers, got {x.dtype}; of complex "
                "parameters PyTorch keeps a norm for each part"
            )
        arrays.append(np.asarray(x))
    step, *moments = arrays
    if step.size != 1 or not 0 <= step.item() < np.inf or step.item() % 1:
        raise ValueError(f"step in {name} must be a whole number, got {step}")
    return int(step.item()), *moments


def _check_array(name: str, x: Any) -> None:
    if not _leaves.is_numeric(x):
        raise TypeError(
            f"{name} must be a NumPy array, got {type(x).__module__}.{type(x).__name__}: for a "
            "tensor of PyTorch pass tensor.float().numpy()"
        )


def _fitted(x: np.ndarray, leaf: Any, path: str, name: Any, axes: Any) -> np.ndarray:
    """A moment in the shape of a leaf, and in the dtype of its arithmetic."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"params {path!r} is {leaf.dtype}, its moments in state are real")
    turned = ""
    if axes is not None:
        if sorted(axes) != list(range(x.ndim)):
            raise ValueError(
                f"transposes has {axes} for {path!r}, but {name!r} has shape {x.shape}"
            )
        turned = f" after the transpose {axes}"
        x = np.transpose(x, axes)
    if x.shape != leaf.shape:
        raise ValueError(
            f"{name!r} has shape {x.shape}{turned}, params {path!r} has {tuple(leaf.shape)}"
        )
    return x.astype(_formats.arithmetic(leaf.dtype))


def _listed(names: Any) -> str:
    return "it has " + (", ".join(map(repr, names)) or "none")
