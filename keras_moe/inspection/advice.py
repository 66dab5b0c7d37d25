"""What to try against an alarm: what the layer can do, and in view of its settings."""

from collections.abc import Sequence

import keras

_FEWER = "fewer experts"
_SLOWER = "a lower learning rate"


def against_imbalance(layer: keras.layers.Layer) -> list[str]:
    """Remedies for experts that get too much or too little."""
    if hasattr(layer, "num_tasks"):
        return [_of_gates(layer), _FEWER]
    if not hasattr(layer, "balance_weight"):
        return [_FEWER]
    return [*balance(layer), *([_SLOWER] if layer.router.loss_weights else []), _FEWER]


def balance(layer: keras.layers.Layer) -> list[str]:
    """What makes a router's load more equal."""
    remedies = []
    if "balance" in layer.router.loss_weights:
        weight = layer.balance_weight
        if not weight:
            remedies.append(f"{_argument(layer, 'balance', 0.01)} (it is 0 now)")
        else:
            remedies.append(f"a balance loss of a coefficient above {weight:g}")
    if hasattr(layer.router, "bias_update_rate"):
        remedies.append(f"a `bias_update_rate` above {layer.router.bias_update_rate:g}")
    elif layer.takes_router:
        remedies.append("`router='sigmoid_bias'`")
    return remedies


def against_sureness(layer: keras.layers.Layer) -> list[str]:
    """Remedies for a router that is sure of every token."""
    remedies = []
    if "z_loss" in layer.router.loss_weights:
        weight = layer.z_loss_weight
        remedies.append(
            f"a router z-loss of a coefficient above {weight:g}"
            if weight
            else f"{_argument(layer, 'z_loss', 0.001)} (it is 0 now)"
        )
    return [*remedies, f"more `jitter` of the router than {layer.router.jitter:g}", _SLOWER]


def against_drops(layer: keras.layers.Layer, training: bool) -> list[str]:
    """Remedies for assignments that find no room."""
    name, value = "capacity", layer.capacity
    if value is None:
        has_own = not training and layer.eval_capacity_factor is not None
        name = "eval_capacity_factor" if has_own else "capacity_factor"
        value = getattr(layer, name)
    limit = "capacity" if name == "capacity" else "capacity_factor"
    if name != "capacity" and value < 1.0:  # no balance makes room for what is not there
        return [
            f"a `{name}` of 1 or more, since {value:g} has room for {100 * value:.0f} % of the "
            "assignments at most",
            f"`{limit}=None`, which drops nothing",
        ]
    return [
        f"a larger `{name}` than {value:g}",
        f"`{limit}=None`, which drops nothing",
        *balance(layer),
    ]


def against_polarisation(layer: keras.layers.Layer) -> list[str]:
    """Remedies for gates that read one expert alone."""
    return [_of_gates(layer), "a lower learning rate of the gates"]


def against_uniformity(layer: keras.layers.Layer) -> list[str]:
    """Remedies for slots that are all the mean token."""
    scale = float(layer.router.scale)
    return [
        f"a larger `scale_initializer` (the scale is {scale:.2g} now)",
        "a higher learning rate",
        "longer training",
    ]


def sentence(remedies: Sequence[str]) -> str:
    """Joins remedies to a sentence."""
    *first, last = remedies
    return f"Try {', '.join(first)}{', or ' * bool(first)}{last}."


def _of_gates(layer: keras.layers.Layer) -> str:
    rate = layer.gate_dropout
    return f"a larger `gate_dropout` than {rate:g}" if rate else "`gate_dropout=0.1`"


def _argument(layer: keras.layers.Layer, loss: str, weight: float) -> str:
    """How a layer is given a loss: by itself, or by the router object that it was given."""
    if not layer.takes_router or isinstance(layer._router_argument, str):
        return f"`{loss}_weight={weight:g}`"
    return f"`{type(layer.router).__name__}(losses={{'{loss}': {weight:g}}})`"
