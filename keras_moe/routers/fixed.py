"""Fixed routing by content, and the controls: what a learned router must beat."""

from typing import Any

import keras
from keras import ops

from keras_moe.core.initializers import derived_seed
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.routers.base import Decision, Router, refuse_arguments_of_others
from keras_moe.routers.selection import all_experts, select_top_k


class FixedRouter(Router):
    """Base of routers that learn nothing: no kernel, no losses, equal weights."""

    def _decision(self, experts: Tensor, logits: Tensor) -> Decision:
        weights = ops.ones_like(experts, dtype="float32") / self.top_k
        return Decision(experts, weights, logits, self.probabilities(logits))


@keras.saving.register_keras_serializable(package="keras_moe")
class HashRouter(FixedRouter):
    """Sends each token to k experts by a fixed hash of its content, each with weight 1 / k.

    experts = the k largest x R, R a normal random `(d, E)` matrix that is drawn once, never
    trained, and saved. It is a locality-sensitive hash: equal tokens go to the same experts, and
    similar ones mostly do. `TokenHashRouter` hashes token ids.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`. Defaults to `1` (the paper's).
        seed: Optional integer from which R, and the draws of `RandomRouter`, come. Defaults to
            `None`.

    Reference:
        Andoni et al. 2015, "Practical and Optimal LSH for Angular Distance", section 3; Roller et
        al. 2021, "Hash Layers For Large Sparse Models".
    """

    def __init__(
        self, num_experts: int, top_k: int = 1, *, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, top_k, seed=seed, **kwargs)

    def build(self, input_shape: Shape) -> None:
        seed = derived_seed(self.seed, "router/projection")
        self.projection = self.add_weight(
            name="projection",
            shape=(tuple(input_shape)[-1], self.num_experts),
            initializer=keras.initializers.RandomNormal(stddev=1.0, seed=seed),
            trainable=False,
        )

    def decide(self, inputs: Tensor, mask: Tensor | None, training: bool | None) -> Decision:
        logits = ops.stop_gradient(ops.matmul(inputs, self.projection))
        return self._decision(select_top_k(logits, self.top_k), logits)


@keras.saving.register_keras_serializable(package="keras_moe")
class RandomRouter(HashRouter):
    """Sends each token to k experts that are drawn anew in each training batch; a control.

    At inference, which is deterministic, to those that `HashRouter` gives.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`. Defaults to `1`.
        seed: Optional integer, seed of the draws. Defaults to `None`.

    Reference:
        Zuo et al. 2022, "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR),
        section 3.
    """

    draws_noise = True

    def decide(self, inputs: Tensor, mask: Tensor | None, training: bool | None) -> Decision:
        if not training:
            return super().decide(inputs, mask, training)
        shape = (ops.shape(inputs)[0], self.num_experts)
        logits = keras.random.normal(shape, dtype="float32", seed=self.seed_generator)
        return self._decision(select_top_k(logits, self.top_k), logits)


@keras.saving.register_keras_serializable(package="keras_moe")
class UniformRouter(FixedRouter):
    """Sends every token to all experts, each with weight 1 / E; a control: an ensemble.

    Args:
        num_experts: Positive integer, the number of experts E.
    """

    chooses_all = True
    fixes_top_k = True

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        refuse_arguments_of_others(type(self), kwargs)
        super().__init__(num_experts, num_experts, **kwargs)

    def build(self, input_shape: Shape) -> None:
        """Makes no weights."""

    def decide(self, inputs: Tensor, mask: Tensor | None, training: bool | None) -> Decision:
        logits = ops.zeros((ops.shape(inputs)[0], self.num_experts), dtype="float32")
        return self._decision(all_experts(logits), logits)

    def get_config(self) -> Config:
        config = super().get_config()
        del config["top_k"], config["seed"]
        return config
