"""Where `optax.adamaxw` fails silently, and what `adamaxw` does there.

Each row is a situation, run with both and compared with the exact value. Run it with

    python benchmarks/reference_failures.py
    python benchmarks/reference_failures.py --markdown    # the rows of the table in the docs
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from versions import versions

import adamaxw


class Row(NamedTuple):
    """One situation and its results.

    Attributes:
        situation: what is done, in words.
        optax: what `optax.adamaxw` gives, a number or a few words.
        ours: what `adamaxw.adamaxw` gives.
        exact: the exact value, or what a user would expect.
    """

    situation: str
    optax: Any
    ours: Any
    exact: Any


def _train(opt: Any, params: Any, grads: Any) -> tuple[Any, Any]:
    """Applies the gradients, stacked along the first axis, one after another."""
    state = opt.init(params)
    step = jax.jit(opt.update)
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def _attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the type of the exception it raises."""
    try:
        return function()
    except (TypeError, ValueError) as error:
        return type(error).__name__


def norm_never_decays() -> Row:
    """The infinity norm in bfloat16: 0.999 u rounds to u."""
    params = jnp.ones((), jnp.bfloat16)
    grads = np.r_[1.0, np.full(2000, 1e-3)]

    def norm(make: Any) -> float:
        _, state = _train(make(0.0), params, jnp.asarray(grads, jnp.bfloat16))
        return float(optax.tree.get(state, "nu"))

    return Row(
        "bfloat16 parameters, a gradient of 1, then 2000 of 1e-3, b2=0.999: the infinity norm",
        norm(optax.adamaxw),
        norm(adamaxw.adamaxw),
        0.999**2000,
    )


def zero_gradient_in_float16() -> Row:
    """Eps = 1e-8 is 0 in float16."""
    params = jnp.ones((), jnp.float16)

    def update(make: Any) -> float:
        opt = make(1e-3, weight_decay=0.0)
        return float(opt.update(jnp.zeros_like(params), opt.init(params), params)[0])

    return Row(
        "float16 parameters, a gradient of 0: the update",
        update(optax.adamaxw),
        update(adamaxw.adamaxw),
        0.0,
    )


def _decayed(make: Any, dtype: Any, parameters: int = 1) -> float:
    params = jnp.ones(parameters, dtype)
    opt = make(1e-2, weight_decay=1e-2)
    params, _ = _train(opt, params, jnp.zeros((2000, parameters), dtype))
    return float(params.astype(jnp.float32).mean())


def decay_lost_in_bfloat16() -> Row:
    """Adding -1e-4 to a bfloat16 parameter near 1 rounds back to it."""
    stochastic = functools.partial(adamaxw.adamaxw, param_rounding="stochastic")
    return Row(
        "bfloat16 parameters, learning_rate x weight_decay = 1e-4, 2000 steps without gradient: "
        'the mean of 10,000 that were 1 (ours: `param_rounding="stochastic"`)',
        _decayed(optax.adamaxw, jnp.bfloat16, 10_000),
        _decayed(stochastic, jnp.bfloat16, 10_000),
        0.9999**2000,
    )


def decay_with_the_default_rounding() -> Row:
    """By default, the sum is rounded to nearest."""
    return Row(
        "the same with the defaults of both",
        _decayed(optax.adamaxw, jnp.bfloat16),
        _decayed(adamaxw.adamaxw, jnp.bfloat16),
        0.9999**2000,
    )


def decay_with_float32_parameters() -> Row:
    """The fix: parameters in float32, which the loss may still cast to bfloat16."""
    return Row(
        "the same with float32 parameters",
        _decayed(optax.adamaxw, jnp.float32),
        _decayed(adamaxw.adamaxw, jnp.float32),
        0.9999**2000,
    )


def scan_with_float32_gradients() -> Row:
    """A state that changes its dtype cannot be carried through a loop."""
    params = jnp.ones(4, jnp.bfloat16)

    def scan(make: Any) -> str:
        opt = make(1e-3)

        def step(state: Any, g: jax.Array) -> tuple[Any, None]:
            return opt.update(g, state, params)[1], None

        jax.lax.scan(step, opt.init(params), jnp.ones((3, 4), jnp.float32))
        return "runs"

    return Row(
        "bfloat16 parameters, float32 gradients: three steps in `jax.lax.scan`",
        _attempt(lambda: scan(optax.adamaxw)),
        _attempt(lambda: scan(adamaxw.adamaxw)),
        "runs",
    )


def injected_b2() -> Row:
    """Injected hyperparameters take the dtype of the parameters (google-deepmind/optax#1414)."""
    params = jnp.ones(4, jnp.bfloat16)

    def b2(make: Any) -> float:
        state: Any = optax.inject_hyperparams(make)(1e-3).init(params)
        return float(state.hyperparams["b2"])

    return Row(
        "`optax.inject_hyperparams` on bfloat16 parameters: b2",
        _attempt(lambda: b2(optax.adamaxw)),
        _attempt(lambda: b2(adamaxw.adamaxw)),
        "0.999, or an error",
    )


def injected_mask() -> Row:
    """A callable mask is taken for a schedule and called with the count."""
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def decay(make: Any) -> float:
        opt = optax.inject_hyperparams(make)(
            1e-2, weight_decay=1e-2, mask=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree)
        )
        updates: Any = opt.update(zeros, opt.init(params), params)[0]
        return float(updates["w"][0, 0])

    return Row(
        "`optax.inject_hyperparams` with a callable mask for matrices: the decay of a matrix",
        _attempt(lambda: decay(optax.adamaxw)),
        _attempt(lambda: decay(adamaxw.adamaxw)),
        "-1e-4, or an error",
    )


def nonsense_accepted() -> list[Row]:
    """Hyperparameters for which the algorithm is not defined."""
    rows = []
    for name, value in {"b1": 1.0, "b2": -1.0, "eps": -1.0, "weight_decay": -1.0}.items():

        def last(make: Any, name: str = name, value: float = value) -> float:
            opt = make(**{"learning_rate": 0.1, name: value})
            grads = np.array([1.0, 0.5, 0.0, 0.0], np.float32)
            return float(_train(opt, jnp.ones(()), grads)[0])

        rows.append(
            Row(
                f"{name}={value:g}: a parameter that was 1, after four steps",
                _attempt(lambda last=last: last(optax.adamaxw)),
                _attempt(lambda last=last: last(adamaxw.adamaxw)),
                "an error",
            )
        )
    return rows


_WITH_INF = np.array([1.0, np.inf, 1.0], np.float32)


def one_inf_gradient() -> Row:
    """An inf gradient is not hidden: neither optimizer recovers by itself."""

    def last(make: Any) -> float:
        return float(_train(make(0.1), jnp.ones(()), _WITH_INF)[0])

    return Row(
        "gradients 1, inf, 1: a parameter that was 1",
        last(optax.adamaxw),
        last(adamaxw.adamaxw),
        "visible",
    )


def one_inf_gradient_skipped() -> Row:
    """The caller skips it with optax.apply_if_finite, in mixed precision too."""
    params = jnp.ones((), jnp.bfloat16)

    def last(make: Any) -> float:
        opt = optax.apply_if_finite(make(0.125, weight_decay=0.0), max_consecutive_errors=3)
        return float(_train(opt, params, _WITH_INF)[0])

    return Row(
        "the same, bfloat16 parameters and float32 gradients, in `optax.apply_if_finite`",
        _attempt(lambda: last(optax.adamaxw)),
        _attempt(lambda: last(adamaxw.adamaxw)),
        0.75,
    )


def state_memory() -> list[Row]:
    """Bytes of state for each parameter, counted from the arrays."""

    def bytes_a_parameter(dtype: Any, make: Any, **options: Any) -> float:
        params = jnp.ones(1000, dtype)
        state = make(1e-3, **options).init(params)
        return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) / params.size

    cases = [
        (jnp.float32, {}),
        (jnp.float32, {"moment_dtype": "bfloat16"}),
        (jnp.float32, {"moment_dtype": "uint8"}),
        (jnp.bfloat16, {}),
        (jnp.bfloat16, {"moment_dtype": "uint8"}),
        (jnp.bfloat16, {"moment_dtype": "uint8", "param_rounding": "exact"}),
    ]
    return [
        Row(
            f"{jnp.dtype(dtype).name} parameters: bytes of state per parameter"
            + "".join(f', `{name}="{value}"`' for name, value in options.items()),
            bytes_a_parameter(dtype, optax.adamaxw),
            bytes_a_parameter(dtype, adamaxw.adamaxw, **options),
            "",
        )
        for dtype, options in cases
    ]


def rows() -> list[Row]:
    """Every situation, run now."""
    return [
        norm_never_decays(),
        zero_gradient_in_float16(),
        decay_lost_in_bfloat16(),
        decay_with_the_default_rounding(),
        decay_with_float32_parameters(),
        scan_with_float32_gradients(),
        injected_b2(),
        injected_mask(),
        *nonsense_accepted(),
        one_inf_gradient(),
        one_inf_gradient_skipped(),
        *state_memory(),
    ]


def _format(value: Any) -> str:
    return value if isinstance(value, str) else f"{value + 0.0:.3g}"  # no "-0"


def markdown() -> list[str]:
    """The rows as lines of a table in Markdown."""
    return [f"| {row.situation} | {' | '.join(map(_format, row[1:]))} |" for row in rows()]


def main() -> None:
    """Prints the table with the versions and the machine."""
    if "--markdown" in sys.argv:
        print(*markdown(), sep="\n")
        return
    console = Console()
    table = Table("situation", "optax.adamaxw", "adamaxw.adamaxw", "exact", show_lines=True)
    for row in rows():
        table.add_row(row.situation, *map(_format, row[1:]))
    console.print(table)
    console.print(versions())


if __name__ == "__main__":
    main()
