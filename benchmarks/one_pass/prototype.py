"""A step of AdamaxW in one pass, in C++ through `jax.ffi`: built, checked and timed.

    python benchmarks/one_pass/prototype.py [8M] [gpt2-small] [--only NAME ...]

Needs g++, and for one of the contenders PyTorch.
"""

import ctypes
import importlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import race
import within_jax

import adamaxw
from adamaxw import _formats, _rule

SOURCE = Path(__file__).with_name("one_pass.cc")
LIBRARY = Path(tempfile.gettempdir()) / "adamaxw_one_pass.so"
TARGET = "adamaxw_one_pass"
# errno of sqrt and traps of floating point would keep the compiler from vectorizing.
FLAGS = "-std=c++17 -O3 -march=native -mprefer-vector-width=512 -fno-math-errno -fno-trapping-math"
# The kernels in the order of the source; the last two measure the memory.
KERNELS = {None: 0, "bfloat16": 1, "uint8": 2, "touch": 3, "copy": 4}
LR, B1, B2, EPS, DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-4


def build() -> None:
    """Compiles the source if it is newer than the library."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > SOURCE.stat().st_mtime:
        return
    include = f"-isystem{jax.ffi.include_dir()}"
    outputs = ["-fPIC", "-shared", str(SOURCE), "-o", str(LIBRARY)]
    subprocess.run(["g++", *FLAGS.split(), include, *outputs], check=True)


def register() -> None:
    """Makes the handler known to JAX."""
    handler = getattr(ctypes.CDLL(str(LIBRARY)), TARGET)
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")


def one_pass(
    leaves: Sequence[Any], scalars: jax.Array, count: jax.Array, kernel: int, first_leaf: int
) -> list[jax.Array]:
    """New parameters, first moments and norms: three leaves for each four of `leaves`.

    Args:
        leaves: parameters of all leaves, then their first moments, norms and gradients.
        scalars: float32, as `Scalars` in the source has them.
        count: int32, the number of updates done.
        kernel: one of `KERNELS`.
        first_leaf: index of the first leaf among those that train.
    """
    results = leaves[: len(leaves) // 4 * 3]
    call = jax.ffi.ffi_call(
        TARGET,
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in results],
        input_output_aliases={index + 2: index for index in range(len(results))},
    )
    attributes = {"kernel": np.int64(kernel), "first_leaf": np.int64(first_leaf)}
    return list(call(scalars, count, *leaves, **attributes))


def step_of(
    kernel: str | None, whole_tree: bool = True
) -> tuple[Callable[[Any], Any], Callable[[Any, Any, Any], Any]]:
    """`init` and `step`, with the state of `adamaxw.adamaxw` and lists as trees.

    Args:
        kernel: a moment_dtype, or "touch" or "copy".
        whole_tree: whether all leaves go into one call; else each has its own.
    """
    moment_dtype = kernel if kernel in ("bfloat16", "uint8") else None
    fmt = _formats.named(moment_dtype)
    opt: Any = adamaxw.adamaxw(LR, B1, B2, EPS, DECAY, moment_dtype=moment_dtype)

    def step(params: Any, state: Any, grads: Any) -> Any:
        count = state.count + 1
        rate = LR / _rule.bias_correction(_rule.Decay.of(B1), count.astype(jnp.float32))
        scale, new_scale = state.nu_scale, None
        if scale is not None:
            new_scale = fmt.rescale(_rule.shrink(_rule.Decay.of(B2), scale), jnp.float32(EPS))
        one = jnp.float32(1)
        scalars = jnp.stack(
            [
                rate,
                jnp.float32(LR * DECAY),
                jnp.float32(1 - B1),
                jnp.float32(1 - B2),
                jnp.float32(EPS),
                one if scale is None else scale,
                one if new_scale is None else new_scale,
            ]
        )
        columns = params, state.mu, state.nu, grads
        calls = [(0, columns)]
        if not whole_tree:
            calls = [(i, [[leaf] for leaf in row]) for i, row in enumerate(zip(*columns))]  # noqa: B905
        new: tuple[list[Any], ...] = [], [], []
        for first_leaf, part in calls:
            leaves = [leaf for column in part for leaf in column]
            results = one_pass(leaves, scalars, state.count, KERNELS[kernel], first_leaf)
            size = len(results) // 3
            for k in range(3):
                new[k].extend(results[k * size : (k + 1) * size])
        params, mu, nu = new
        return params, state._replace(count=count, mu=mu, nu=nu, nu_scale=new_scale)

    return opt.init, step


def contender(kernel: str | None, whole_tree: bool = True) -> race.Contender:
    """The prototype, jitted and donated."""

    def prepare(shapes: Sequence[tuple[int, ...]]) -> race.Run:
        register()
        return race.jitted(shapes, *step_of(kernel, whole_tree))

    return race.Contender(prepare)


def torch_contender(foreach: bool) -> race.Contender:
    """`torch.optim.Adamax`, its step compiled; `foreach` goes through all leaves at once."""

    def prepare(shapes: Sequence[tuple[int, ...]]) -> race.Run:
        torch: Any = importlib.import_module("torch")
        torch.set_num_threads(os.cpu_count())
        params = [torch.from_numpy(np.array(leaf)) for leaf in race.arrays(shapes, 0)]
        for param, gradient in zip(params, race.arrays(shapes, 1), strict=True):
            param.grad = torch.from_numpy(np.array(gradient))
        opt = torch.optim.Adamax(params, LR, (B1, B2), EPS, DECAY, foreach=foreach)
        compiled = torch.compile(opt.step)

        def run(params: Any, state: Any, grads: Any) -> Any:
            del grads
            compiled()
            return params, state

        return run, params, None, None

    return race.Contender(prepare)


def check() -> None:
    """Prints how far the prototype is from `adamaxw.adamaxw` after 100 steps."""
    register()
    shapes = [(300, 1000), (7,), (1,), (65_537,)]
    for moment_dtype in (None, "bfloat16", "uint8"):
        opt: Any = adamaxw.adamaxw(LR, B1, B2, EPS, DECAY, moment_dtype=moment_dtype)

        def reference(params: Any, state: Any, grads: Any, opt: Any = opt) -> Any:
            updates, state = opt.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        init, fused = step_of(moment_dtype)
        runs = []
        for step in (jax.jit(reference), jax.jit(fused)):
            params = race.arrays(shapes, 0)
            state = init(params)
            for i in range(100):
                params, state = step(params, state, race.arrays(shapes, 1 + i))
            runs.append(
                [
                    np.concatenate([np.ravel(x) for x in tree])
                    for tree in (params, state.mu, state.nu)
                ]
            )
        print(f"\nmoments {moment_dtype}, after 100 steps:")
        for name, theirs, ours in zip(("params", "mu", "nu"), *runs, strict=True):
            apart = np.abs(_ordinal(theirs) - _ordinal(ours))
            shares = ", ".join(f"{np.mean(apart <= n):.4%} within {n}" for n in (0, 1, 2))
            largest = np.abs(theirs.astype(float) - ours.astype(float)).max()
            print(f"  {name}, in ulp or codes: {shares}; at most {apart.max()} ({largest:.1e}) off")


def _ordinal(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers in the order of the numbers, neighbours one apart."""
    if x.dtype.kind in "iu":
        return x.astype(np.int64)
    bits = x.view(f"i{x.dtype.itemsize}").astype(np.int64)
    return np.where(bits < 0, -(2 ** (8 * x.dtype.itemsize - 1)) - bits, bits)


CONTENDERS = {
    "optax.adamaxw": within_jax.CONTENDERS["optax.adamaxw"],
    "float32: adamaxw": within_jax.CONTENDERS["float32: adamaxw"],
    "float32: flag": within_jax.CONTENDERS["float32: flag"],
    "float32: flag, siblings": within_jax.CONTENDERS["float32: flag, siblings"],
    "torch.optim.Adamax, compiled": torch_contender(foreach=False),
    "torch.optim.Adamax, foreach, compiled": torch_contender(foreach=True),
    "float32: one pass": contender(None),
    "float32: one pass, a call for each leaf": contender(None, whole_tree=False),
    "28 bytes a parameter, hardly any arithmetic": contender("touch"),
    "copy of 4 bytes a parameter": contender("copy"),
    "bfloat16: adamaxw": within_jax.CONTENDERS["bfloat16: adamaxw"],
    "bfloat16: 512 bits": within_jax.CONTENDERS["bfloat16: 512 bits"],
    "bfloat16: one pass": contender("bfloat16"),
    "uint8: adamaxw": within_jax.CONTENDERS["uint8: adamaxw"],
    "uint8: 512 bits": within_jax.CONTENDERS["uint8: 512 bits"],
    "uint8: one pass": contender("uint8"),
}
_NARROW = ["optax.adamaxw", *(name for name in CONTENDERS if name[:4] in ("bflo", "uint"))]
_FLOAT32 = [name for name in CONTENDERS if name not in _NARROW[1:]]

if __name__ == "__main__":
    if not race.is_worker():
        build()
        check()
    race.main(
        CONTENDERS,
        [("8M", _FLOAT32), ("8M", _NARROW), ("gpt2-small", _FLOAT32), ("gpt2-small", _NARROW)],
    )
