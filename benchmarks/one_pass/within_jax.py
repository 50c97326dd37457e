"""Whether JAX alone can make one loop of a step on the CPU: flags and a rearrangement, timed.

python benchmarks/one_pass/within_jax.py [8M] [gpt2-small] [--only NAME ...]
"""

from typing import Any

import optax
import race
from jax import lax

import adamaxw

MERGE = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"
WIDE = {"xla_cpu_prefer_vector_width": 512}


def plain(opt: Any, options: Any = None, flags: str = "") -> race.Contender:
    """The step as users write it."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return race.Contender(lambda shapes: race.jitted(shapes, opt.init, step, options), flags)


def siblings(opt: Any, options: Any = None, flags: str = MERGE) -> race.Contender:
    """New parameters that do not depend on the new moments: they are computed twice.

    Multi-output fusion merges only loops of which none reads what another wrote. The barrier keeps
    the two computations apart until loops are made, and LLVM finds what they share.
    """

    def step(params: Any, state: Any, grads: Any) -> Any:
        _, new_state = opt.update(grads, state, params)
        grads, state, params = lax.optimization_barrier((grads, state, params))
        updates, _ = opt.update(grads, state, params)
        return optax.apply_updates(params, updates), new_state

    return race.Contender(lambda shapes: race.jitted(shapes, opt.init, step, options), flags)


CONTENDERS = {
    "optax.adamaxw": plain(optax.adamaxw(1e-3)),
    "optax.adamaxw, flag": plain(optax.adamaxw(1e-3), flags=MERGE),
    "float32: adamaxw": plain(adamaxw.adamaxw(1e-3)),
    "float32: 512 bits": plain(adamaxw.adamaxw(1e-3), WIDE),
    "float32: flag": plain(adamaxw.adamaxw(1e-3), flags=MERGE),
    "float32: flag, siblings": siblings(adamaxw.adamaxw(1e-3)),
    "float32: flag, siblings, 512 bits": siblings(adamaxw.adamaxw(1e-3), WIDE),
    "float32: siblings without the flag": siblings(adamaxw.adamaxw(1e-3), flags=""),
}
for _dtype in ("bfloat16", "uint8"):
    _opt = adamaxw.adamaxw(1e-3, moment_dtype=_dtype)
    CONTENDERS |= {
        f"{_dtype}: adamaxw": plain(_opt),
        f"{_dtype}: 512 bits": plain(_opt, WIDE),
        f"{_dtype}: flag": plain(_opt, flags=MERGE),
    }
# Several times as slow as the others, which it would disturb.
_SLOW = "float32: siblings without the flag"
_BASE = ("optax.adamaxw", "float32: adamaxw")


def _named(*starts: str) -> list[str]:
    return [name for name in CONTENDERS if name.startswith(starts) and name != _SLOW]


if __name__ == "__main__":
    race.main(
        CONTENDERS,
        [
            ("8M", _named("optax", "float32")),
            ("8M", [*_BASE, _SLOW]),
            ("8M", ["optax.adamaxw", *_named("bfloat16", "uint8")]),
            ("gpt2-small", [*_BASE, "float32: flag", "float32: flag, siblings"]),
            ("gpt2-small", ["optax.adamaxw", *_named("bfloat16", "uint8")]),
        ],
    )
