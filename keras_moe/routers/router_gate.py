"""Gates that are routers: each task has one, which chooses among the experts that it may take."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.initializers import derived_seed, reseeded_config
from keras_moe.core.several_calls import KeepsLosses
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.routers import registry
from keras_moe.routers.base import LinearRouter, Router
from keras_moe.routers.gates import Gate, log_shares
from keras_moe.routers.selection import spread

# What a gate can be by name, besides the banks. Others choose tokens, drop them, or read nothing.
NAMED = ("top_k", "noisy_top_k", "dselect_k", "sigmoid_bias", "relu", "sinkhorn")


@keras.saving.register_keras_serializable(package="keras_moe")
class RouterGate(KeepsLosses, Gate):
    """Gives every task a router of its own, which chooses experts for each example.

    weights[n,t,:] are the router's weights of the experts that it chose, and 0 for the others. All
    experts are computed. The routers bring their losses, with the coefficients that they have:
    those of noisy top-k and the entropy of DSelect-k.

    Args:
        num_experts: Positive integer, the number of experts E.
        num_tasks: Positive integer, the number of tasks T.
        router: A name out of "top_k", "noisy_top_k", "dselect_k", "sigmoid_bias", "relu" and
            "sinkhorn", the config of a `keras_moe.routers.LinearRouter`, or a function of a number
            of experts that returns one. Each task's is made for the experts that it may take.
            Defaults to `"top_k"`.
        top_k: Positive integer, the experts per example of a named router. Defaults to `2`.
        **kwargs: Arguments of `Gate`: `access`, `dropout`, `seed`.

    Call arguments:
        inputs: `(N, d)`, read by all gates, or `(T, N, d)`, one input per gate.
        mask: Optional bool `(N,)`, False at padding, which takes no part in losses.
        training: Whether dropout and the routers' noise are on.

    Returns:
        A `keras_moe.GateRouting` of shape `(N, T, E)`.

    Raises:
        ValueError: on a router that is none of these, or a task with fewer experts than `top_k`.

    Example:

    >>> import keras_moe
    >>> gate = keras_moe.routers.RouterGate(4, 2, router="dselect_k", top_k=2)
    >>> layer = keras_moe.layers.MMoE(4, [16], tasks=["click", "like"], gate=gate)
    """

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        router: str | Config | Callable[[int], Router] = "top_k",
        *,
        top_k: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, num_tasks, **kwargs)
        self.top_k = checks.positive_int("top_k", top_k)
        self._router_argument = router
        self.routers = [self._made(task) for task in range(self.num_tasks)]

    def _experts_of(self, task: int) -> Sequence[int]:
        """The numbers of the experts that a task may take."""
        if self.access is None:
            return range(self.num_experts)
        return [int(expert) for expert in np.flatnonzero(self.access[task])]

    def _made(self, task: int) -> LinearRouter:
        router, count = self._router_argument, len(self._experts_of(task))
        if isinstance(router, str):
            checks.one_of("router", router, NAMED)
            if self.top_k > count:
                checks.fail(
                    f"`top_k` must be at most the experts of a task: task {task} has {count}.",
                    top_k=self.top_k,
                )
            made: Any = registry.NAMED_ROUTERS[router](
                count, self.top_k, seed=derived_seed(self.seed, f"router_{task}")
            )
        elif isinstance(router, dict):
            config = {**router, "config": {**router["config"], "num_experts": count}}
            config.pop("build_config", None)  # it is built with the gate
            made = keras.saving.deserialize_keras_object(
                reseeded_config(config, "gates/router", task)
            )
        elif callable(router):
            made = router(count)
        else:
            made = router
        if not isinstance(made, LinearRouter) or made.chooses_tokens or made.has_capacity:
            checks.fail(
                f"`router` must be one of {list(NAMED)}, the config of a `LinearRouter` in which "
                "examples choose experts, or a function of a number of experts that returns one.",
                router=router,
            )
        if made.num_experts != count:
            checks.fail(
                f"`router` must have num_experts={count} for task {task}.",
                **{"router.num_experts": made.num_experts},
            )
        made.name = f"router_{task}"
        return made

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("RouterGate", tuple(input_shape))
        for router in self.routers:
            router.build((None, width))

    def weigh(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None
    ) -> tuple[Tensor, Tensor]:
        weights = []
        for task, router in enumerate(self.routers):
            own = inputs if len(inputs.shape) == 2 else inputs[task]
            record = router(own, mask=mask, training=training)
            for name, weight in router.loss_weights.items():
                if weight and router.trainable:
                    # In the dtype of the model's loss, to which TensorFlow adds no other.
                    loss = weight * record.losses[name]
                    self.add_loss(ops.cast(loss, keras.config.floatx()))
            kept = ops.where(record.kept, record.weights, 0.0)
            found = spread(kept, record.experts, router.num_experts)
            weights.append(self._among_all(task, found))
        stacked = ops.stack(weights, axis=1)
        return stacked, log_shares(stacked)

    def _among_all(self, task: int, weights: Tensor) -> Tensor:
        """Weights of a task's experts, `(N, its experts)`, as those of all, `(N, E)`."""
        if self.access is None:
            return weights
        place = np.zeros((len(self._experts_of(task)), self.num_experts), "float32")
        place[np.arange(len(place)), self._experts_of(task)] = 1.0
        return ops.matmul(weights, ops.convert_to_tensor(place))

    def get_config(self) -> Config:
        router = self._router_argument
        if not isinstance(router, str):
            router = keras.saving.serialize_keras_object(self.routers[0])
        return {**super().get_config(), "router": router, "top_k": self.top_k}
