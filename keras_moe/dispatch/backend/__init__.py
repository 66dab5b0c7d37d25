"""What each backend does faster than portable Keras code: the only place that imports a backend.

A backend's module has:

- `carry(tokens, weights, slots, ends, stages)`: what each token's experts give, summed, with a
  gradient of its own;
- `row_padding(total, num_experts)`: rows that it needs behind the last one;
- `is_on_cpu(tensor)`;
- `with_gradient` and `inverse_permutation`, where Keras's own will not do;
- `reach(outputs, variables)`, where what a batch does not reach has no gradient otherwise;
- `is_traced_for_export()` and `sort_for_export(bin_of, num_bins)`, where exports need them;
- `grouped_matmul(rows, kernel, ends)` and `may_have_grouped_matmul()`: the platform's
  native grouped matmul, where there is one.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import keras

from keras_moe.types import Tensor

_BACKENDS = ("jax", "tensorflow", "torch")


def reach(outputs: Tensor, variables: Sequence[Tensor]) -> Tensor:
    """The outputs, by which each variable has a gradient, 0 where it took no part in them."""
    own = getattr(current(), "reach", None)
    return outputs if own is None else own(outputs, variables)


def is_traced_for_export() -> bool:
    """Whether the call is traced for export, as far as a backend tells."""
    own = getattr(current(), "is_traced_for_export", None)
    return own is not None and own()


def current() -> ModuleType | None:
    """The module of the backend in use, or None for one that has no module here."""
    name = keras.backend.backend()
    if name not in _BACKENDS:
        return None
    return importlib.import_module(f"{__name__}.{name}")
