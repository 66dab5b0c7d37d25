"""Breaks the code on purpose, thirty-three times, and counts the tests that notice.

`python -m tests.mutations` runs on request: each mutation replaces a piece of code in a copy of the
project and runs the tests that should turn red. It fails if one stays green. `--write` stores which
were red in `tests/data/mutations.json`.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests/data/mutations.json"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to break the code.

    Attributes:
        name: what is broken, in words.
        file: the file, from the root.
        old: a piece of code that stands there once.
        new: what replaces it.
        tests: the files of tests that must notice.
        backend: what they run on; "tfrs" for the bridge's environment.
        select: those of the files that run, as `pytest -k` takes it; all by default.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    backend: str = "torch"
    select: str = ""


LAYERS, ROUTERS, DISPATCH = "keras_moe/layers/", "keras_moe/routers/", "keras_moe/dispatch/"
JAX, TORCH = DISPATCH + "backend/jax.py", DISPATCH + "backend/torch.py"
TENSORFLOW, TUNING = DISPATCH + "backend/tensorflow/", "keras_moe/tuning/"
FLOPS = "keras_moe/flops/"
BRIDGE = "keras_moe/integrations/tfrs.py"

CONTRACT = "tests/layers/test_contract.py"
VALUES = "tests/layers/test_values_and_gradients.py"
TRAPS = "tests/layers/test_traps.py"
WALK = "tests/dispatch/test_walk.py"
ROUTER_ORACLES = "tests/routers/test_router_oracles.py"
TFRS = "tests/integrations/test_tfrs.py"

MUTATIONS = (
    # === Layers ===
    Mutation(
        "padding keeps its output",
        LAYERS + "moe.py",
        "            outputs = zero_where_padded(outputs, mask)",
        "            pass",
        (VALUES,),
        select="masked",
    ),
    Mutation(
        "the capacity of inference is taken in training",
        "keras_moe/core/capacity.py",
        "is_eval = not training and self.eval_factor is not None",
        "is_eval = training and self.eval_factor is not None",
        (TRAPS,),
    ),
    Mutation(
        "a frozen router still has losses",
        LAYERS + "losses.py",
        "if not self.router.trainable:",
        "if False:",
        (CONTRACT,),
        select="frozen",
    ),
    Mutation(
        "the experts of MMoE end without an activation",
        LAYERS + "mmoe.py",
        '"activate_last": True,',
        '"activate_last": False,',
        ("tests/parity",),
    ),
    Mutation(
        "slots are filled by the combine weights",
        LAYERS + "soft_moe.py",
        "dispatch = ops.cast(routing.dispatch, self.compute_dtype)",
        "dispatch = ops.cast(routing.combine, self.compute_dtype)",
        ("tests/parity",),
    ),
    Mutation(
        "an expert is drawn with the fans of all",
        LAYERS + "expert_mlp.py",
        'initializer=PerExpertInitializer(self.kernel_initializer, f"{self.name}/{name}"),',
        "initializer=self.kernel_initializer,",
        (TRAPS,),
        select="fans",
    ),
    # === Routers ===
    Mutation(
        "a single choice weighs 1",
        ROUTERS + "top_k.py",
        "if self.normalize and self.largest_top_k > 1 else weights",
        "if self.normalize else weights",
        (ROUTER_ORACLES,),
    ),
    Mutation(
        "the balance loss grows with k",
        ROUTERS + "losses.py",
        "fractions = total / (tokens * top_k)",
        "fractions = total / tokens",
        (ROUTER_ORACLES,),
    ),
    Mutation(
        "the z-loss counts padding",
        ROUTERS + "losses.py",
        "return masked_sum(per_token, mask) / token_count(logits, mask)",
        "return ops.sum(per_token) / token_count(logits, mask)",
        (ROUTER_ORACLES,),
    ),
    Mutation(
        "the selection bias leaks into the scores",
        ROUTERS + "sigmoid_bias.py",
        "return experts, self.routed_scale * weights",
        "return experts, self.routed_scale * weights + ops.mean(self.bias)",
        (ROUTER_ORACLES,),
    ),
    Mutation(
        "jitter stays on in inference",
        ROUTERS + "base.py",
        "if training and self.jitter:",
        "if self.jitter:",
        (CONTRACT,),
        select="deterministic",
    ),
    # === Dispatch ===
    Mutation(
        "second choices come before first ones",
        DISPATCH + "dispatcher.py",
        "return ops.reshape(ops.transpose(bins), (-1,))",
        "return ops.reshape(ops.transpose(bins)[::-1], (-1,))",
        (TRAPS, "tests/dispatch"),
    ),
    Mutation(
        "an expert takes one assignment more than it has slots",
        DISPATCH + "plan.py",
        "is_kept = ops.logical_and(bins.bin_of < num_bins, position < capacity)",
        "is_kept = ops.logical_and(bins.bin_of < num_bins, position <= capacity)",
        (TRAPS, "tests/dispatch/test_capacity.py"),
    ),
    # === JAX ===
    Mutation(
        "a block's gradient takes in the next expert's rows",
        JAX,
        "        return jnp.where(is_row, rows, 0)",
        "        return rows",
        (WALK,),
        "jax",
    ),
    Mutation(
        "the gradient of a weight forgets the bias",
        JAX,
        "grad_weight = grad_weight + jnp.sum(unweighted * bias, -1, dtype=tape.wide)",
        "grad_weight = grad_weight + jnp.sum(unweighted * 0, -1, dtype=tape.wide)",
        (WALK,),
        "jax",
    ),
    Mutation(
        "a token without an expert gets some slot's output",
        JAX,
        "chosen.append(jnp.where(is_kept.reshape(-1, *[1] * (rows.ndim - 1)), values, 0))",
        "chosen.append(values)",
        (WALK,),
        "jax",
    ),
    Mutation(
        "nothing follows the last row",
        JAX,
        "return block_sizes(total, num_experts)[0]",
        "return 0",
        (WALK,),
        "jax",
    ),
    # === TensorFlow ===
    Mutation(
        "a token's sum has its first choice alone",
        TENSORFLOW + "ranges.py",
        "    for chosen in others:",
        "    for chosen in others[:0]:",
        (VALUES,),
        "tensorflow",
        select="test_moe_top_k",
    ),
    Mutation(
        "the gradients of weights belong to other choices",
        TENSORFLOW + "ranges.py",
        "grad_weights = tf.gather(grad_weight[:, 0], tf.transpose(_slot_of(route)))",
        "grad_weights = tf.gather(grad_weight[:, 0], tf.transpose(_slot_of(route)))[:, ::-1]",
        (VALUES,),
        "tensorflow",
        select="test_moe_top_k",
    ),
    Mutation(
        "under XLA a block's gradient takes in the next expert's rows",
        TENSORFLOW + "blocks.py",
        "return tf.where(is_row, _read(at, size, all_), tf.zeros([], all_.dtype))",
        "return _read(at, size, all_)",
        (WALK,),
        "tensorflow",
    ),
    Mutation(
        "the gradient of a weight forgets the bias in TensorFlow",
        TENSORFLOW + "stages.py",
        "            grad_weight = grad_weight + row_sums(each * bias)",
        "            grad_weight = grad_weight + 0 * row_sums(each * bias)",
        (WALK,),
        "tensorflow",
    ),
    # === PyTorch ===
    Mutation(
        "the gradient of a weight forgets the bias in PyTorch",
        TORCH,
        "grad_weight[start:end] += grad_outputs.to(wide) @ bias_of",
        "grad_weight[start:end] += 0 * (grad_outputs.to(wide) @ bias_of)",
        (WALK,),
    ),
    Mutation(
        "idle experts have a gradient of whatever was in memory",
        TORCH,
        "    gradient = torch.empty_like(weights)",
        "    gradient = torch.full_like(weights, 7.0)\n    return gradient",
        (WALK,),
    ),
    Mutation(
        "half precision forgets the weights of choices",
        TORCH,
        "sums += chosen if weights is None else chosen * weights[:, choice, None]",
        "sums += chosen",
        (CONTRACT,),
        select="precision",
    ),
    Mutation(
        "idle Keras layers have no gradient",
        TORCH,
        "            torch.zeros_like(each) if is_needed else None",
        "            None",
        ("tests/layers/test_idle_experts.py",),
    ),
    # === Tuning ===
    Mutation(
        "all experts count as active",
        FLOPS + "active_parameters.py",
        "chosen = Fraction(layer.router.experts_per_token, layer.num_experts)",
        "chosen = Fraction(1)",
        ("tests/tuning/test_active_parameters.py",),
    ),
    Mutation(
        "shared experts cost nothing",
        FLOPS + "layer_flops.py",
        "        flops += layer_flops(layer.shared_experts, shared)",
        "        flops += 0 * layer_flops(layer.shared_experts, shared)",
        ("tests/tuning/test_active_flops.py",),
    ),
    Mutation(
        "a model below the target is punished as one above it",
        TUNING + "active_cost.py",
        "factor *= ratio ** self.exponent[int(ratio > 1)]",
        "factor *= ratio ** self.exponent[int(ratio < 1)]",
        ("tests/tuning/test_active_cost.py",),
    ),
    Mutation(
        "another search may use the folder",
        TUNING + "check_project.py",
        "        if differing:",
        "        if False:",
        ("tests/tuning/test_check_project.py",),
    ),
    # === The bridge ===
    Mutation(
        "the bridge forgets the auxiliary losses",
        BRIDGE,
        "self.add_loss([tf.cast(loss, tf_keras.backend.floatx()) for loss in call_losses])",
        "pass",
        (TFRS,),
        "tfrs",
    ),
    Mutation(
        "the bridge trains what is frozen",
        BRIDGE,
        "return [variable.value for variable in self.layer.trainable_weights]",
        "return [variable.value for variable in self.layer.weights]",
        (TFRS,),
        "tfrs",
    ),
    Mutation(
        "the bridge loads its weights in another order",
        BRIDGE,
        "            variable.assign(store[str(index)])",
        "            variable.assign(0 * store[str(index)])",
        (TFRS,),
        "tfrs",
    ),
    Mutation(
        "the bridge always infers",
        BRIDGE,
        "outputs = self.layer(inputs, *args, training=training, **kwargs)",
        "outputs = self.layer(inputs, *args, training=False, **kwargs)",
        (TFRS,),
        "tfrs",
    ),
)


def copy_of_project(folder: Path) -> Path:
    """Copies what git tracks."""
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    copy = folder / "keras_moe"
    for file in filter(None, files):
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, copy / file)
    return copy


def red_tests(copy: Path, mutation: Mutation) -> list[str]:
    """Runs tests in the copy and returns those that do not pass."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "TF_CPP_MIN_LOG_LEVEL": "3"}
    backend = mutation.backend
    environment["KERAS_BACKEND"] = "tensorflow" if backend == "tfrs" else backend
    if backend == "tfrs":
        environment["TF_USE_LEGACY_KERAS"] = "1"
    if backend != "torch":
        environment["XLA_FLAGS"] = (
            "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        )
    command = [sys.executable, "-m", "pytest", "-n", "2", "-q", "--tb=no", "-rfE"]
    command += [*mutation.tests, "-k", mutation.select]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, flags=re.MULTILINE)


def is_in_check(mutation: Mutation, red: list[str]) -> bool:
    """Whether `make check` runs one of the tests that are red."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    if mutation.backend == "tfrs":
        names = re.search(r"test_tfrs\.py -k \"(.*?)\"", makefile)
        return any(name in test for test in red for name in names[1].split(" or "))
    paths = re.search(r"^CHECK_TESTS := (.*)$", makefile, flags=re.MULTILINE)[1].split()
    return mutation.backend == "torch" and any(test.startswith(tuple(paths)) for test in red)


def measure(mutations: tuple[Mutation, ...]) -> dict[str, dict[str, object]]:
    """Breaks, counts, mends, and prints a line for each."""
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_project(Path(folder))
        for mutation in mutations:
            file, began = copy / mutation.file, time.perf_counter()
            code = file.read_text()
            if code.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.file} has no single {mutation.old!r}")
            file.write_text(code.replace(mutation.old, mutation.new))
            red = red_tests(copy, mutation)
            file.write_text(code)
            found[mutation.name] = {
                "file": mutation.file,
                "backend": mutation.backend,
                "red": len(red),
                "in make check": is_in_check(mutation, red),
                "tests": sorted(red)[:5],
            }
            seconds = time.perf_counter() - began
            place = "check" if is_in_check(mutation, red) else "test"
            print(
                f"{len(red):5d} red by make {place:5s}  {seconds:4.0f} s  {mutation.name}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="mutations whose name or file holds this")
    parser.add_argument("--write", action="store_true", help=f"store the counts in {RESULTS.name}")
    arguments = parser.parse_args()
    chosen = tuple(m for m in MUTATIONS if arguments.only in m.name or arguments.only in m.file)
    found = measure(chosen)
    if arguments.write:
        stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps({**stored, **found}, indent=1) + "\n")
    early = sum(bool(result["in make check"]) for result in found.values())
    print(f"{early} of {len(found)} by `make check`")
    unseen = [name for name, result in found.items() if not result["red"]]
    if unseen:
        raise SystemExit(f"no test noticed: {unseen}")


if __name__ == "__main__":
    main()
