"""A few tokens: the time is that of reading weights, so that is what it is measured against.

The reference reads as many weights as the chosen experts hold, each once, and does as little with
them as can be: one token through a dense layer of hidden width D h, where D is the number of
distinct experts that the T tokens chose. It is the strictest fair limit: the mixture must read
those weights, and does more with them (up to T k / D tokens per expert). Both read the same arrays
in every call, so caches help both alike; `weight_bytes` over the time says how far from memory
they are.
"""

from __future__ import annotations

from benchmarks import ours, references
from benchmarks.contender import OURS, Case, Comparison, Contender, Options
from benchmarks.controlled_routing import even_shares, load_facts, routed_inputs
from benchmarks.rows import FORWARD, Row

READING = "reading the weights"
_FLOAT_BYTES = 4


def case(row: Row, options: Options) -> Case:
    """Ours / one token through a dense layer that holds the chosen experts' weights."""
    sizes = row.sizes
    inputs = routed_inputs(sizes, even_shares(sizes.experts))
    facts = load_facts(inputs, sizes)
    hidden = facts["experts_used"] * sizes.hidden
    layers = ours.contenders(sizes, inputs, options.dispatchers, row.capacity_factor)
    reading = Contender(READING, lambda: references.dense_ffn(sizes.width, hidden), inputs[:1])
    comparisons = [
        Comparison(layer.name, READING, row.limits if layer.name == OURS else {})
        for layer in layers
    ]
    facts |= ours.plan_facts(sizes, row.capacity_factor)
    facts["weight_bytes"] = 2 * sizes.width * hidden * _FLOAT_BYTES
    return Case([*layers, reading], comparisons, (FORWARD,), facts)
