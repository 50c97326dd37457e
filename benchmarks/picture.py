"""The picture of the README: 2 bytes of state, and bfloat16 parameters, as they learn.

The left panel shows runs of `convergence.py`. For the right panel, the language model of the
examples is trained for 300 steps and then fine-tuned at a small constant learning rate: in float32,
and with bfloat16 parameters by `optax.adamaxw` and `adamaxw.adamaxw`. Run it with

    python benchmarks/picture.py            # draws docs/images/learning.svg
    python benchmarks/picture.py --train    # trains before that, in about two minutes
"""

import argparse
import json
from pathlib import Path
from typing import Any

import convergence
import jax
import matplotlib
import numpy as np
import optax
import results
from convergence import REFERENCE, RESULTS
from matplotlib.figure import Figure
from versions import versions

import adamaxw

FINE_TUNED = RESULTS.with_name("picture.json")
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "learning.svg"
PRETRAINING, STEPS, LEARNING_RATE = 300, 2000, 3e-4
OPTAX, OURS = "optax.adamaxw, bfloat16", "bfloat16 stochastic, moments uint8"
# Colors that differ in lightness too, on white, which also serves where the page is dark.
GREY, DARK_GREY, BLUE, RED = "#b4bcc6", "#5b6673", "#0b5fa5", "#c1440e"


def pretrained() -> Any:
    """Parameters of the language model after `PRETRAINING` steps in float32."""
    task = convergence.transformer(PRETRAINING)
    opt = task.optimizer(optax.adamaxw)

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(task.loss)(params, batch, jax.random.key(0))
        updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = task.init(jax.random.key(0))
    batches = task.batches(np.random.default_rng(0))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[0][0])(
        (params, opt.init(params))
    )


def fine_tune() -> dict[str, Any]:
    """Held-out losses of the fine-tuning by each optimizer, and what they depend on."""
    params = pretrained()
    task = convergence.transformer(STEPS)
    task = task._replace(
        init=lambda key: params,
        # Other windows than those of the pretraining.
        batches=lambda rng: convergence.transformer(STEPS).batches(np.random.default_rng(1)),
        optimizer=lambda make: optax.chain(
            optax.clip_by_global_norm(1.0),
            make(LEARNING_RATE, weight_decay=0.1, mask=adamaxw.masks.matrices),
        ),
    )
    variants = convergence.variants()
    runs = {
        name: convergence.train(task, variants[name], 1)[0] for name in (REFERENCE, OPTAX, OURS)
    }
    return {
        "command": "python benchmarks/picture.py --train",
        "versions": versions(),
        "steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "held_out": {name: [round(float(x), 6) for x in losses] for name, losses in runs.items()},
    }


def draw(path: Path, scratch: dict[str, Any], tuned: dict[str, Any]) -> None:
    """Draws both panels from the results of `convergence.py` and of `fine_tune`."""
    # Readable where the picture is 390 pixels wide.
    style: Any = {"font.size": 20, "svg.hashsalt": "adamaxw", "axes.titlesize": 21}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 5.6))
        figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
        left, right = figure.subplots(1, 2)

        found = scratch["transformer"]["held_out"]
        steps = np.linspace(0, 600, convergence.EVALUATIONS + 1)
        for name, color, width in ((REFERENCE, GREY, 10), ("float32, moments uint8", BLUE, 3)):
            # Without the loss before training, next to which all others look alike.
            left.plot(steps[1:], np.mean(found[name], axis=0)[1:], color=color, lw=width)
        left.annotate(
            "float32 state:\n8 bytes per\nparameter", (290, 2.34), color=DARK_GREY, va="bottom"
        )
        left.annotate("uint8 state:\n2 bytes", (50, 2.05), color=BLUE, va="bottom")
        left.set_title("Training from scratch", loc="left")

        steps = np.linspace(0, tuned["steps"], convergence.EVALUATIONS + 1)
        for name, color, width in ((REFERENCE, GREY, 10), (OPTAX, RED, 4), (OURS, BLUE, 3)):
            right.plot(steps, tuned["held_out"][name], color=color, lw=width)
        right.annotate("bfloat16,\noptax.adamaxw", (620, 2.262), color=RED, va="bottom")
        right.annotate("bfloat16,\nadamaxw", (60, 2.222), color=BLUE, va="center")
        right.annotate("float32", (1250, 2.242), color=DARK_GREY, va="center")
        right.set_title("Fine-tuning at rate 3e-4", loc="left")

        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlabel("step")
            axes.grid(color="0.92")
            axes.set_axisbelow(True)
            axes.locator_params(nbins=4)
        left.set_ylabel("held-out loss (nats per byte)")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Trains if asked, and draws."""
    parser = argparse.ArgumentParser(description="Draw the picture of the README.")
    parser.add_argument("--train", action="store_true", help="repeat the fine-tuning")
    if parser.parse_args().train:
        results.write(FINE_TUNED, fine_tune())
    draw(PICTURE, json.loads(RESULTS.read_text()), json.loads(FINE_TUNED.read_text()))


if __name__ == "__main__":
    main()
