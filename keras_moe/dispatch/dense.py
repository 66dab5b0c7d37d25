"""All experts on all tokens: right when most experts are chosen anyway."""

import keras
from keras import ops

from keras_moe.dispatch.carrier import Carrier, ExpertBank, weighted_sum
from keras_moe.routing import Routing
from keras_moe.types import Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class DenseCarrier(Carrier):
    """Runs every expert on every token and mixes: E / k times the chosen experts' FLOPs."""

    name = "dense"

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: ExpertBank,
        *,
        capacity: int | Tensor | None = None,
        groups: int | Tensor = 1,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        del capacity, groups
        outputs = experts(ops.expand_dims(tokens, 0), training=training)
        gates = self._gates(routing, experts.num_experts)
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        return weighted_sum(outputs, gates, dtype), routing.kept

    @staticmethod
    def _gates(routing: Routing, num_experts: int) -> Tensor:
        """Spreads the chosen weights `(N, k)` over the experts, `(E, N)`."""
        weights = ops.where(routing.kept, routing.weights, ops.zeros_like(routing.weights))
        experts = ops.arange(num_experts, dtype="int32")[:, None, None]
        is_chosen = ops.equal(ops.expand_dims(routing.experts, 0), experts)  # (E, N, k)
        return ops.sum(ops.where(is_chosen, ops.expand_dims(weights, 0), 0.0), axis=-1)
