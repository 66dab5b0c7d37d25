"""Measures the memory of one step of one contender, in a process of its own: see `measure.memory`.

python -m benchmarks.memory_probe '{"backend": ..., "row": ..., "contender": ..., "which": ...}'
"""

from __future__ import annotations

import gc
import json
import sys
from typing import Any

from benchmarks import engines
from benchmarks.contender import Options
from benchmarks.kinds import build_case
from benchmarks.measure import memory
from benchmarks.rows import select


def probe(arguments: dict[str, Any]) -> int:
    """Bytes of one warm step, less those of the weights' gradients."""
    options = Options(
        arguments["backend"], arguments["dispatchers"], peers=False, quick=arguments["quick"]
    )
    engine = engines.get(options.backend)
    (row,) = select([arguments["row"]])
    case = build_case(row.quick() if options.quick else row, options)
    (contender,) = (
        candidate for candidate in case.contenders if candidate.name == arguments["contender"]
    )
    layer = contender.make()
    step = engine.step(layer, contender, arguments["which"])
    step()
    step()
    gc.collect()
    return memory.peak_of_step(step) - memory.weight_bytes(layer)


if __name__ == "__main__":
    print(f"{memory.PREFIX}{probe(json.loads(sys.argv[1]))}")
