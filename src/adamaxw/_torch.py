"""The state of `torch.optim.Adamax`, read from arrays: no PyTorch, nothing unpickled."""

import reprlib
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
    for argument, given in (("names", names), ("transposes", transposes)):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{argument} must be a dict with paths of params, got {type(given).__name__}"
            )
    rows, treedef = _paths.named(params), jax.tree.structure(params)
    leaves = dict(rows)
    if len(leaves) != len(rows):
        raise ValueError("two leaves of params have the same path, so names cannot tell them apart")
    for argument, given in (("names", names), ("transposes", transposes)):
        unknown = [path for path in given if path not in leaves]
        if unknown:
            raise ValueError(f"{argument} has no leaf of params for {unknown}: {_listed(leaves)}")
    slots = _slots(state)
    aliases = _aliases(state)
    used: dict[Any, str] = {}
    steps: dict[int, str] = {}
    moments = []
    for path, leaf in leaves.items():
        if not _leaves.is_numeric(leaf):
            raise TypeError(f"params {path!r} must be an array, got {_leaves.describe(leaf)}")
        trains = jnp.issubdtype(leaf.dtype, jnp.inexact)
        if trains and path not in names:
            raise ValueError(f"names must say which parameter is {path!r}, or None for no state")
        name = names.get(path)
        if name is None:
            dtypes = _formats.WIDE.dtypes(leaf.dtype) if trains else (leaf.dtype,) * 2
            moments.append([_place(np.zeros(leaf.shape, dtype), leaf) for dtype in dtypes])
            continue
        if not isinstance(name, str) and not isinstance(name, (int, np.integer)):
            raise TypeError(
                f"names must have a number, a string or None for {path!r}, got {reprlib.repr(name)}"
            )
        key = _key(aliases.get(name, name) if isinstance(name, str) else name)
        if key not in slots:
            raise ValueError(
                f"names has {name!r} for {path!r}, which state does not have: "
                f"{_listed([*slots, *aliases])}. Give None for a parameter that never had a "
                "gradient"
            )
        if key in used:
            raise ValueError(f"names has {name!r} for both {used[key]!r} and {path!r}")
        used[key] = path
        step, *both = _parameter(f"state of {name!r}", slots[key])
        steps.setdefault(step, path)
        axes = transposes.get(path)
        moments.append([_fitted(x, leaf, path, name, axes) for x in both])
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
    count = np.int32(min(next(iter(steps), 0), 2**31 - 1))
    mu, nu = (treedef.unflatten([pair[i] for pair in moments]) for i in range(2))
    return jnp.asarray(count), mu, nu


def _slots(state: Any) -> dict[Any, Any]:
    """What the state has of each parameter, by number or name."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state must be a dict, a state_dict() or what safetensors.numpy.load_file returns, "
            f"got {type(state).__name__}"
        )
    if isinstance(state.get("state"), Mapping):
        return {_key(key): slots for key, slots in state["state"].items()}
    slots: dict[Any, Any] = {}
    for key, value in state.items():
        prefix, *middle = str(key).split(".")
        if prefix != "state" or len(middle) < 2:
            raise ValueError(
                f'state has the key {key!r}, where "state.0.exp_avg" or '
                '"state.dense.weight.exp_avg" was expected'
            )
        *middle, slot = middle
        slots.setdefault(_key(".".join(middle)), {})[slot] = value
    return slots


def _aliases(state: Any) -> dict[str, Any]:
    """The numbers of parameters by name, where the optimizer was given `named_parameters()`."""
    try:
        return {
            name: _key(number)
            for group in state.get("param_groups", ())
            for name, number in zip(group.get("param_names", ()), group["params"], strict=False)
            if isinstance(number, (int, str))
        }
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ValueError(
            "param_groups in state must be a list of dicts, as state_dict() has it, got "
            f"{reprlib.repr(state['param_groups'])}"
        ) from None


def _key(name: Any) -> Any:
    return int(name) if isinstance(name, str) and name.isdecimal() else name


def _parameter(name: str, slots: Any) -> tuple[int, np.ndarray, np.ndarray]:
    """The step and the two moments of one parameter."""
    if not isinstance(slots, Mapping):
        raise TypeError(f"{name} must be a dict, got {reprlib.repr(slots)}")
    if "exp_avg_sq" in slots:
        raise ValueError(
            f"{name} has exp_avg_sq, as Adam keeps it, an average of squares: no infinity norm can "
            "be made of it. Go on with the state of init, and warm the learning rate up"
        )
    missing = [slot for slot in ("step", "exp_avg", "exp_inf") if slot not in slots]
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(missing)}, but {_listed(slots)}")
    arrays = []
    for slot in ("exp_avg", "exp_inf"):
        x = _array(f"{slot} in {name}", slots[slot])
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{slot} in {name} must be real floating numbers, got {x.dtype}; of complex "
                "parameters PyTorch keeps a norm for each part"
            )
        arrays.append(x)
    step = _array(f"step in {name}", slots["step"])
    is_real = jnp.issubdtype(step.dtype, jnp.integer) or jnp.issubdtype(step.dtype, jnp.floating)
    number = step.astype(np.float64).reshape(-1) if is_real else np.zeros(0)
    if number.size != 1 or not (number[0] >= 0 and number[0] == np.floor(number[0]) < np.inf):
        raise ValueError(f"step in {name} must be a whole number, got {reprlib.repr(step)}")
    return int(number[0]), *arrays


def _array(name: str, x: Any) -> np.ndarray:
    x = np.asarray(x) if isinstance(x, (int, float)) else x
    if not _leaves.is_numeric(x):
        raise TypeError(
            f"{name} must be a NumPy array, got {type(x).__module__}.{type(x).__name__}: for a "
            "tensor of PyTorch pass tensor.float().numpy()"
        )
    return np.asarray(x)


def _fitted(x: np.ndarray, leaf: Any, path: str, name: Any, axes: Any) -> Any:
    """A moment in the shape and the dtype of arithmetic of a leaf."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"params {path!r} is {leaf.dtype}, its moments in state are real")
    if axes is not None:
        are_numbers = isinstance(axes, (tuple, list)) and all(isinstance(i, int) for i in axes)
        if not are_numbers or sorted(axes) != list(range(x.ndim)):
            raise ValueError(
                f"transposes has {axes} for {path!r}, which is no permutation of the "
                f"{x.ndim} axes of {name!r}"
            )
        x = np.transpose(x, axes)
    if x.shape != leaf.shape:
        turned = "" if axes is None else f" after the transpose {tuple(axes)}"
        raise ValueError(
            f"{name!r} has shape {x.shape}{turned}, params {path!r} has {tuple(leaf.shape)}"
        )
    return _place(x.astype(_formats.arithmetic(leaf.dtype)), leaf)


def _place(x: np.ndarray, leaf: Any) -> jax.Array:
    """On the devices of a leaf."""
    is_placed = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False)
    place = leaf.sharding if is_placed else None
    return jax.device_put(x, None if place is None else _places.concrete(place))


def _listed(names: Any) -> str:
    return "it has " + (", ".join(map(repr, names)) or "none")
