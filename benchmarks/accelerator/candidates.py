"""Grouped matmuls side by side on one device, in bfloat16: which is worth building on?

python -m benchmarks.accelerator.candidates OUT.json, on the backend of KERAS_BACKEND. One product
of sorted rows (R, d) with E experts' (d, h), groups drawn unevenly, and its two gradients, each
alone; against a dense product of as many FLOPs and a batched one of equal groups. TINY=1: small
sizes, for a try on a CPU. On a CPU, kernels of Pallas are interpreted: their times mean nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

# Rows, d, h, E: DeepSeek's sizes, Qwen3's while it writes 64 texts, Mixtral's.
SHAPES = [(262144, 2048, 1408, 64), (512, 2048, 768, 128), (32768, 4096, 14336, 8)]
if os.environ.get("TINY"):
    SHAPES = [(256, 64, 128, 8)]
FORWARD, BY_ROWS, BY_KERNELS = "forward", "by rows", "by kernels"
LIMIT = 0.2  # seconds that one candidate is timed


class Job(NamedTuple):
    """One pass of one candidate: a function and its arguments."""

    name: str
    which: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Groups(NamedTuple):
    """The sorted rows of one shape, as NumPy sees them."""

    rows: Any
    kernel: Any
    upstream: Any
    ends: np.ndarray


def uneven(total: int, num_experts: int) -> np.ndarray:
    """Where groups end whose shares are between 0.5 and 1.5 of an even one."""
    share = np.random.default_rng(0).uniform(0.5, 1.5, num_experts)
    return np.floor(np.cumsum(share) / share.sum() * total + 0.5).astype("int32")


def error_of(
    found: Any, which: str, groups: Groups, to_numpy: Callable[[Any], np.ndarray]
) -> float:
    """The largest relative error over the first and last rows of some groups."""
    worst, num_experts = 0.0, len(groups.ends)
    starts = np.concatenate([[0], groups.ends[:-1]])
    for expert in {0, num_experts // 2, num_experts - 1}:
        start, end = int(starts[expert]), int(groups.ends[expert])
        if start == end:
            continue
        if which == BY_KERNELS:
            left, right = groups.rows[start:end, :8], groups.upstream[start:end, :64]
            pairs = [(to_numpy(found[expert, :8, :64]), to_numpy(left).T @ to_numpy(right))]
        else:
            kernel = to_numpy(groups.kernel[expert])
            source, matrix = (
                (groups.rows, kernel) if which == FORWARD else (groups.upstream, kernel.T)
            )
            parts = [slice(start, min(start + 8, end)), slice(max(end - 3, start), end)]
            pairs = [(to_numpy(found[part]), to_numpy(source[part]) @ matrix) for part in parts]
        for mine, right in pairs:
            worst = max(worst, float(np.linalg.norm(mine - right) / np.linalg.norm(right)))
    return worst


def median_seconds(run: Callable[[], Any], wait: Callable[[Any], None]) -> float:
    """The median of groups of five calls, warm."""
    wait(run())
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - start < LIMIT and len(times) < 100):
        begin = time.perf_counter()
        for _ in range(5):
            result = run()
        wait(result)
        times.append((time.perf_counter() - begin) / 5)
        if times[-1] > 0.1 and len(times) > 1:
            break
    return statistics.median(times)


class Jax:
    """Candidates on JAX: XLA's, ours by sizes of tiles, and the kernels that JAX ships."""

    def __init__(self) -> None:
        import jax

        from keras_moe.dispatch.backend import jax_gpu

        self.jax, self.kernels = jax, jax_gpu
        self.is_cpu = jax.default_backend() == "cpu"
        self.device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        self.wait = jax.block_until_ready

    def groups(self, shape: tuple[int, int, int, int]) -> Groups:
        jax, (total, width, hidden, experts) = self.jax, shape
        keys = jax.random.split(jax.random.key(0), 3)
        sizes = (total, width), (experts, width, hidden), (total, hidden)
        rows, kernel, upstream = (
            jax.random.normal(key, size, "bfloat16") for key, size in zip(keys, sizes, strict=True)
        )
        return Groups(rows, kernel * width**-0.5, upstream, uneven(total, experts))

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array, "float32")

    def tiles(self, mean: int) -> list[Any]:
        tiles = self.kernels.Tiles
        if os.environ.get("TINY"):
            return [tiles(16, 64, 32, 4, 2)]
        if mean < 64:
            return [tiles(16, 128, 64, 4, 4), tiles(16, 128, 128, 4, 4), tiles(16, 64, 128, 4, 4)]
        return [
            tiles(128, 128, 64, 4, 3),
            tiles(128, 128, 64, 8, 3),
            tiles(128, 256, 64, 8, 3),
            tiles(128, 256, 64, 8, 4),
            tiles(256, 128, 64, 8, 3),
        ]

    def jobs(self, groups: Groups) -> list[Job]:
        jax, (rows, kernel, upstream) = self.jax, groups[:3]
        jnp, ends = jax.numpy, jax.numpy.asarray(groups.ends)
        sizes = jnp.diff(ends, prepend=0)
        experts = kernel.shape[0]
        even, even_up = (
            rows.reshape(experts, -1, rows.shape[1]),
            upstream.reshape(experts, -1, upstream.shape[1]),
        )
        jobs = [
            Job("dense", FORWARD, lambda a, b: a @ b, (rows, kernel[0])),
            Job("dense", BY_ROWS, lambda a, b: a @ b.T, (upstream, kernel[0])),
            Job("dense", BY_KERNELS, lambda a, b: a.T @ b, (rows, upstream)),
            Job("batched", FORWARD, lambda a, b: a @ b, (even, kernel)),
            Job("batched", BY_ROWS, lambda a, b: a @ b.mT, (even_up, kernel)),
            Job("batched", BY_KERNELS, lambda a, b: a.mT @ b, (even, even_up)),
            # Of 64 experts and more, its copies of the rows are too many for the memory.
            *(
                [Job("ragged_dot", FORWARD, jax.lax.ragged_dot, (rows, kernel, sizes))]
                if experts <= 8 or len(rows) <= 512
                else []
            ),
        ]
        for tiles in self.tiles(len(rows) // experts):
            tiling = self.kernels.Tiling(tiles, tiles, interpret=self.is_cpu)
            name = "ours " + ",".join(map(str, tiles))
            for which, is_transposed, source in ((FORWARD, False, rows), (BY_ROWS, True, upstream)):
                function = jax.tree_util.Partial(self.kernels._product, tiling, is_transposed)
                jobs.append(Job(name, which, function, (source, kernel, ends)))
            function = jax.tree_util.Partial(self.kernels._by_kernels, tiling)
            jobs.append(Job(name, BY_KERNELS, function, (rows, upstream, ends)))
        return [*jobs, *([] if self.is_cpu else self.shipped(rows, kernel, upstream, sizes))]

    def shipped(self, rows: Any, kernel: Any, upstream: Any, sizes: Any) -> list[Job]:
        """The kernels for Hopper that are in JAX, and tokamax's, where they are."""
        jobs = []
        try:
            from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

            few = len(rows) // kernel.shape[0] < 64
            for m, n, k in [(64, 128, 64)] if few else [(128, 128, 64), (64, 256, 64)]:
                how = dict(block_m=m, block_n=n, block_k=k, max_concurrent_steps=4, grid_block_n=1)

                def product(a: Any, b: Any, s: Any, how: Any = how, back: bool = False) -> Any:
                    return ragged_dot_mgpu.ragged_dot(
                        a, b, group_sizes=s, transpose_rhs=back, **how
                    )

                def back(a: Any, b: Any, s: Any, product: Any = product) -> Any:
                    return product(a, b, s, back=True)

                def outer(a: Any, b: Any, s: Any, how: Any = how) -> Any:
                    return transposed_ragged_dot_mgpu.transposed_ragged_dot(
                        a, b, group_sizes=s, **how
                    )

                name = f"jax mosaic {m},{n},{k}"
                jobs += [
                    Job(name, FORWARD, product, (rows, kernel, sizes)),
                    Job(name, BY_ROWS, back, (upstream, kernel, sizes)),
                    Job(name, BY_KERNELS, outer, (rows, upstream, sizes)),
                ]
        except ImportError as error:
            print("mosaic:", error)
        try:
            import tokamax

            jobs.append(Job("tokamax", FORWARD, tokamax.ragged_dot, (rows, kernel, sizes)))
        except ImportError:
            print("tokamax is not installed")
        return jobs

    def prepared(self, jobs: list[Job]) -> list[Any]:
        """All programs, compiled side by side; an error where one does not compile."""

        def program(job: Job) -> Any:
            try:
                return self.jax.jit(job.function).lower(*job.arguments).compile()
            except Exception as error:  # a candidate that does not compile is a finding
                return error

        with ThreadPoolExecutor(12) as pool:
            return list(pool.map(program, jobs))


class Torch:
    """Candidates on PyTorch: its grouped matmul, whose gradients are its own."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.on = "cuda" if torch.cuda.is_available() else "cpu"
        name = torch.cuda.get_device_name() if self.on == "cuda" else "cpu"
        self.device = f"{name}, torch {torch.__version__}"

    def wait(self, _: Any) -> None:
        if self.on == "cuda":
            self.torch.cuda.synchronize()

    def groups(self, shape: tuple[int, int, int, int]) -> Groups:
        torch, (total, width, hidden, experts) = self.torch, shape
        torch.manual_seed(0)
        made = [
            torch.randn(size, device=self.on, dtype=torch.bfloat16)
            for size in ((total, width), (experts, width, hidden), (total, hidden))
        ]
        return Groups(made[0], made[1] * width**-0.5, made[2], uneven(total, experts))

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array.detach().float().cpu())

    def jobs(self, groups: Groups) -> list[Job]:
        torch, (rows, kernel, upstream) = self.torch, groups[:3]
        experts = kernel.shape[0]
        offsets = torch.from_numpy(groups.ends).to(self.on)
        even, even_up = (
            rows.view(experts, -1, rows.shape[1]),
            upstream.view(experts, -1, upstream.shape[1]),
        )
        grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
        return [
            Job("dense", FORWARD, torch.matmul, (rows, kernel[0])),
            Job("dense", BY_ROWS, lambda a, b: a @ b.T, (upstream, kernel[0])),
            Job("dense", BY_KERNELS, lambda a, b: a.T @ b, (rows, upstream)),
            Job("batched", FORWARD, torch.bmm, (even, kernel)),
            Job("batched", BY_ROWS, lambda a, b: torch.bmm(a, b.mT), (even_up, kernel)),
            Job("batched", BY_KERNELS, lambda a, b: torch.bmm(a.mT, b), (even, even_up)),
            Job("grouped_mm", FORWARD, lambda a, b: grouped(a, b, offs=offsets), (rows, kernel)),
            Job(
                "grouped_mm",
                BY_ROWS,
                lambda a, b: grouped(a, b.mT, offs=offsets),
                (upstream, kernel),
            ),
            Job(
                "grouped_mm",
                BY_KERNELS,
                lambda a, b: grouped(a.T, b, offs=offsets),
                (rows, upstream),
            ),
        ]

    def prepared(self, jobs: list[Job]) -> list[Any]:
        return [job.function for job in jobs]


def measure(engine: Any, job: Job, program: Any, groups: Groups) -> dict[str, Any]:
    """What one candidate takes in one pass, and how far it is off."""
    if isinstance(program, Exception):
        raise program
    found = program(*job.arguments)
    is_reference = job.name in ("dense", "batched")
    error = None if is_reference else error_of(found, job.which, groups, engine.to_numpy)
    del found
    seconds = median_seconds(lambda: program(*job.arguments), engine.wait)
    total, width = groups.rows.shape
    flops = 2 * total * width * groups.upstream.shape[1]
    return {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12, "error": error}


def main(out: Path) -> None:
    engine: Any = {"jax": Jax, "torch": Torch}[keras.backend.backend()]()
    print(engine.device, flush=True)
    records: list[dict[str, Any]] = []
    for shape in SHAPES:
        groups = engine.groups(shape)
        jobs = engine.jobs(groups)
        dense: dict[str, float] = {}
        print(shape)
        for job, program in zip(jobs, engine.prepared(jobs), strict=True):
            entry: dict[str, Any] = {"shape": shape, "who": job.name, "pass": job.which}
            try:
                entry |= measure(engine, job, program, groups)
                if job.name == "dense":
                    dense[job.which] = entry["ms"]
                entry["over_dense"] = entry["ms"] / dense[job.which]
                print(
                    f"{job.which:11s}{job.name:28s}{entry['ms']:9.3f} ms {entry['tflops']:6.1f} "
                    f"TFLOP/s {entry['over_dense']:6.2f} x dense, error {entry['error']}",
                    flush=True,
                )
            except Exception as problem:  # a candidate that does not run is a finding
                entry["problem"] = f"{type(problem).__name__}: {str(problem)[:200]}"
                print(f"{job.which:11s}{job.name:28s}{entry['problem']}", flush=True)
            records.append(entry)
            report = {"device": engine.device, "dtype": "bfloat16", "records": records}
            out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
