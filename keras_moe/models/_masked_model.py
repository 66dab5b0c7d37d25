"""Functional models that take a mask."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedModel(keras.Model):
    """A functional model whose layers get the masks of its inputs, `model(x, mask=mask)`.

    Keras's own hands them on, and warns that it does not; it leaves them on the tensors that it was
    called with, so that a later call without a mask would have it; and it takes the masks of a dict
    of inputs by their order, not by their names. In a dict, sequences of ids can have a mask.
    """

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        if mask is not None:
            inputs = keras.tree.map_structure(ops.copy, inputs)
            if isinstance(self.input, dict):
                mask = self._mask_of_each_input(mask)
        return super().call(inputs, training=training, mask=mask, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Adds no mask to those that the layers gave to the outputs."""

    def _mask_of_each_input(self, mask: Any) -> dict[str, Any]:
        """The masks by name, None where there is none."""
        names = [name for name, spec in sorted(self.input.items()) if _holds_sequences(spec)]
        masks = mask if isinstance(mask, dict) else {None: mask}
        if any(value is not None and name not in names for name, value in masks.items()):
            checks.fail(
                f"`mask` must be a dict of inputs that are sequences of ids, of {names}, to masks.",
                mask=mask,
            )
        return {name: masks.get(name) for name in self.input}


def _holds_sequences(spec: Any) -> bool:
    return len(spec.shape) == 2 and "int" in keras.backend.standardize_dtype(spec.dtype)
