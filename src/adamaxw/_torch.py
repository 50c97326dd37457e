"""The state of `torch.optim.Adamax`, read from NumPy arrays: PyTorch is not needed."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamaxw import _checks, _formats, _leaves, _paths, _places


def read(
    state: Mapping[str, Any],
    params: Any,
    names: Mapping[str, int | str | None],
    transposes: Mapping[str, tuple[int, ...]],
) -> tuple[Any, Any, Any]:
    """The count and the two trees of moments; see `moments.from_torch`."""
    leaves, slots, numbers = dict(_paths.named_leaves(params)), _slots(state), _numbers(state)
    keys = {path: numbers.get(name, str(name)) for path, name in names.items() if name is not None}
    _check_one_to_one(leaves, names, transposes, slots, keys)
    steps: dict[int, str] = {}
    rows: list[Any] = []
    for path, leaf in leaves.items():
        if path in keys:
            slot = slots[keys[path]]
            step = np.asarray(slot["step"]).item()  # PyTorch counts in float32
            steps.setdefault(int(step), path)
            moments = [np.asarray(slot[name]) for name in ("exp_avg", "exp_inf")]
            if path in transposes:
                moments = [np.transpose(x, transposes[path]) for x in moments]
            is_real = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (leaf, *moments))
            if not is_real or [x.shape for x in moments] != [leaf.shape] * 2:
                raise ValueError(
                    f"exp_avg and exp_inf of {names[path]!r} (axes {transposes.get(path)}) "
                    f"must be real and of the shape of params {path!r}, {_checks.in_words(leaf)}, "
                    f"got {', '.join(map(_checks.in_words, moments))}"
                )
            moments = [x.astype(_formats.arithmetic(leaf.dtype)) for x in moments]
        else:
            trains = jnp.issubdtype(leaf.dtype, jnp.inexact)
            dtypes = _formats.WIDE.dtypes(leaf.dtype) if trains else (leaf.dtype,) * 2
            moments = [np.zeros(leaf.shape, dtype) for dtype in dtypes]
        place = _places.concrete(leaf.sharding) if _places.is_placed(leaf) else None
        rows.append([jax.device_put(x, place) for x in moments])
    if len(steps) > 1:
        raise ValueError(
            f"parameters in state differ in their number of steps: {steps}. Read those with equal "
            "steps together, one call per group, and give each its optimizer by optax.partition"
        )
    count = jnp.int32(min(max(steps, default=0), 2**31 - 1))
    return count, *_leaves.columns(jax.tree.structure(params), rows, 2)


def _slots(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The slots of each parameter, by its number or name."""
    if "state" in state:
        return {str(key): slots for key, slots in state["state"].items()}
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, slot = str(key).removeprefix("state.").rpartition(".")
        found.setdefault(name, {})[slot] = value
    return found


def _numbers(state: Mapping[str, Any]) -> dict[Any, str]:
    """The numbers of parameters by name, if the optimizer was given `named_parameters()`."""
    return {
        name: str(number)
        for group in state.get("param_groups", ())
        for name, number in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def _check_one_to_one(leaves: Any, names: Any, transposes: Any, slots: Any, keys: Any) -> None:
    """Every leaf that trains must have a parameter or None, and every parameter one leaf."""
    trained = [path for path, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.inexact)]
    missing = [names[path] for path, key in keys.items() if key not in slots]
    repeated = [key for key, number in Counter(keys.values()).items() if number > 1]
    others = [key for key in slots if not {"step", "exp_avg", "exp_inf"} <= set(slots[key])]
    problems = {
        "names lacks leaves of params": [path for path in trained if path not in names],
        "params lacks leaves of names": [path for path in names if path not in leaves],
        "params lacks leaves of transposes": [path for path in transposes if path not in leaves],
        "names lacks parameters of state": [key for key in slots if key not in keys.values()],
        "state lacks parameters of names": missing,
        "names has several leaves for": repeated,
        "state is not of Adamax (the averages of squares of Adam do not convert) for": others,
    }
    found = "; ".join(f"{words} {which}" for words, which in problems.items() if which)
    if found:
        raise ValueError(f"{found}. In names, map leaves that have no state to None")
