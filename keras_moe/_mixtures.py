"""Finding the mixture layers of a model, and telling them apart."""

from collections import Counter
from typing import Any


def mixture_layers(model: Any) -> list[Any]:
    """All built layers of a model, nested ones too, that keep running counts."""
    return [
        layer
        for layer in model._flatten_layers()
        if callable(getattr(layer, "running_counts", None)) and layer.built
    ]


def unique_names(layers: list[Any]) -> list[tuple[str, Any]]:
    """Names the layers by their own name: "moe", then "moe#2" for a second "moe"."""
    seen: Counter[str] = Counter()
    named = []
    for layer in layers:
        seen[layer.name] += 1
        count = seen[layer.name]
        named.append((layer.name if count == 1 else f"{layer.name}#{count}", layer))
    return named
