"""Measures what each dispatcher costs on this machine, and says what `"auto"` takes and why.

    python -m keras_moe.dispatch
    python -m keras_moe.dispatch --tokens 4096 --width 768 --hidden-dim 3072 --experts 16 --top-k 2

One `MoE` layer per dispatcher, in a compiled model: inference is `predict_on_batch`, training is
`train_on_batch` with SGD. All take turns; a time is the median over rounds. The choice of "auto"
never looks at a time: it follows the kind of device and the sizes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_moe import layers
from keras_moe.core import checks
from keras_moe.dispatch import native
from keras_moe.dispatch.choose import DISPATCHERS

_UNUSED = "-"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m keras_moe.dispatch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {
        "--tokens": (2048, "tokens of a call"),
        "--width": (256, "their width d"),
        "--hidden-dim": (1024, "hidden width h of an expert"),
        "--experts": (8, "experts E"),
        "--top-k": (2, "experts per token k"),
        "--rounds": (7, "rounds of which the median is taken"),
    }
    for flag, (default, meaning) in sizes.items():
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument("--capacity-factor", type=float, help="default: nothing is dropped")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "mixed_bfloat16", "float16", "mixed_float16"],
        default="float32",
        help="dtype policy (default: float32)",
    )
    parsed = parser.parse_args(arguments)
    try:
        for flag in sizes:
            name = flag.removeprefix("--").replace("-", "_")
            checks.positive_int(flag, getattr(parsed, name))
        checks.int_between("--top-k", parsed.top_k, 1, parsed.experts, "--experts")
        checks.optional(checks.positive, "--capacity-factor", parsed.capacity_factor)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return parsed


def make_layer(parsed: argparse.Namespace, dispatch: str) -> layers.MoE:
    return layers.MoE(
        parsed.experts,
        parsed.hidden_dim,
        top_k=parsed.top_k,
        capacity_factor=parsed.capacity_factor,
        dispatch=dispatch,
        dtype=parsed.dtype,
    )


def measure(parsed: argparse.Namespace) -> dict[str, dict[str, float] | str]:
    """Seconds of inference and training by dispatcher, or why there are none."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(parsed.tokens, parsed.width)).astype("float32")
    steps: dict[str, dict[str, Callable[[], Any]]] = {}
    found: dict[str, Any] = {}
    for name in sorted(DISPATCHERS):
        keras.utils.set_random_seed(0)  # the same routing for all
        try:
            if name == "grouped":
                native.check(keras.DTypePolicy(parsed.dtype).compute_dtype)
            model = keras.Sequential([keras.Input((parsed.width,)), make_layer(parsed, name)])
            model.compile(keras.optimizers.SGD(1e-3), "mse")
            of_model: dict[str, Callable[[], Any]] = {
                "inference": partial(model.predict_on_batch, tokens),
                "training": partial(model.train_on_batch, tokens, tokens),
            }
            for step in of_model.values():  # compiles
                step()
        except ValueError as error:  # what a dispatcher lacks here
            found[name] = str(error).splitlines()[0]
            continue
        steps[name], found[name] = of_model, {}
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(parsed.rounds):
        for name, kinds in steps.items():
            for kind, step in kinds.items():
                start = time.perf_counter()
                step()
                times.setdefault((name, kind), []).append(time.perf_counter() - start)
    for (name, kind), seconds in times.items():
        found[name][kind] = statistics.median(seconds)
    return found


def table(parsed: argparse.Namespace, found: dict[str, dict[str, float] | str]) -> list[str]:
    """The lines of the table: times, over the least of their column, and the choice of "auto"."""
    layer = make_layer(parsed, "auto")
    layer.build((None, parsed.width))
    plans = {
        kind: layer.dispatch_plan(parsed.tokens, training=kind == "training")
        for kind in ("inference", "training")
    }
    best = {
        kind: min(times[kind] for times in found.values() if isinstance(times, dict))
        for kind in plans
    }
    lines = [f"{'dispatcher':15s} {'inference':>20s} {'training':>20s}"]
    for name, times in found.items():
        if isinstance(times, str):
            lines.append(f"{name:15s} {_UNUSED:>20s} {_UNUSED:>20s}   {times}")
            continue
        cells = [
            f"{1e3 * times[kind]:8.2f} ms {times[kind] / best[kind]:5.2f} x"
            + ("*" if plans[kind].dispatcher == name else " ")
            for kind in plans
        ]
        lines.append(f"{name:15s} {cells[0]:>20s} {cells[1]:>20s}")
    lines.append("")
    for kind, plan in plans.items():
        lines.append(f'* "auto" in {kind}: {plan.dispatcher}. {plan.reason}.')
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    capacity = parsed.capacity_factor
    print(
        f"Backend {keras.backend.backend()}, {parsed.dtype}: {parsed.tokens} tokens of width "
        f"{parsed.width}, {parsed.experts} experts of hidden width {parsed.hidden_dim}, top "
        f"{parsed.top_k}, " + (f"capacity factor {capacity}" if capacity else "nothing dropped")
    )
    dtype = keras.DTypePolicy(parsed.dtype).compute_dtype
    problem = native.problem(dtype)
    print("Grouped matmul of the platform: " + (problem or "right, and worth using.") + "\n")
    print("\n".join(table(parsed, measure(parsed))))


if __name__ == "__main__":
    main()
