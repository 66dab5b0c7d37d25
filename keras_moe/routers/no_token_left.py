"""No-Token-Left-Behind: what an expert has no place for goes to the next one."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.capacity import capacity_of
from keras_moe.core.numerics import edges_of
from keras_moe.core.types import Config, Size, Tensor
from keras_moe.routers.base import Decision, Served
from keras_moe.routers.selection import pick, select_top_k
from keras_moe.routers.top_k import TopKRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class NoTokenLeftRouter(TopKRouter):
    """Sends what an expert has no place for to the next one, in rounds; top-k otherwise.

    Every expert has C = ceil(capacity_factor * k * N / E) places, N the tokens of the batch,
    padding included, or `capacity`. In round r each token that has fewer than k places asks its
    r-th best expert, which takes earlier tokens first as long as it has places. What has no place
    after the last round is dropped: weight 0, `kept` False. With k = 1 and all rounds nothing is
    where `capacity_factor` is at least 1; with more k nothing is from E / (E - k + 1) on, and no
    token is left without any expert from 1 on.

    weight_j is that of `TopKRouter`: s_j, with k > 1 divided by the sum over the k experts, those
    of a dropped place included. Losses and `load` are those of the plain top-k, before overflow. An
    output depends on the other tokens of the batch. The paper saw no gain in quality from it.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`. Defaults to `1` (the paper's).
        capacity_factor: Positive number; None where there is a `capacity`. A named router has what
            the layer is given. Defaults to `1.25` (the paper's in training).
        eval_capacity_factor: Positive number, the same at inference; None for the same as in
            training. Defaults to `None`; the paper's code has 2.0.
        capacity: Positive integer, the places C of each expert, at most N, with
            `capacity_factor=None`. Defaults to `None`.
        rounds: Integer between `top_k` and `num_experts`, the most experts that a token asks; None
            for all. A round in which nobody asks is not run. Defaults to `None`.
        normalize: Whether the weights of a token sum to 1 before drops. Defaults to `True`.
        score: `"softmax"` or `"sigmoid"`. Defaults to `"softmax"`.
        **kwargs: Arguments of `TopKRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`.

    Example:

    >>> import keras_moe
    >>> layer = keras_moe.layers.MoE(8, 64, router="no_token_left", top_k=1, capacity_factor=1.0)

    Reference:
        Fedus et al. 2021, "Switch Transformers", appendix B and figure 11.
    """

    has_capacity = True

    def __init__(
        self,
        num_experts: int,
        top_k: int = 1,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        capacity: int | None = None,
        rounds: int | None = None,
        normalize: bool = True,
        score: str = "softmax",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, normalize=normalize, score=score, **kwargs)
        self._capacity = capacity_of(capacity, capacity_factor, eval_capacity_factor)
        self.capacity, self.capacity_factor = self._capacity.slots, self._capacity.factor
        self.eval_capacity_factor = self._capacity.eval_factor
        if capacity is None and capacity_factor is None:
            checks.fail(
                "`capacity_factor` must be a number above 0 where there is no `capacity`.",
                capacity_factor=None,
            )
        self.rounds = self.num_experts if rounds is None else rounds
        checks.int_between("rounds", self.rounds, self.top_k, self.num_experts, "num_experts")

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        asked = super().decide(inputs, mask, training, **more)
        ranked = select_top_k(asked.logits, self.rounds)
        granted = self._granted(ranked, mask, self._places(inputs, training))
        # Granted experts first, best first; where they are fewer than k, the best of the others.
        preference = ops.where(granted, 2 * self.rounds, self.rounds) - ops.arange(self.rounds)
        place = select_top_k(ops.cast(preference, "float32"), self.top_k)
        experts = pick(ranked, place)
        is_placed = pick(granted, place)
        is_softmax = self.score == "softmax"
        scores = asked.probabilities if is_softmax else ops.sigmoid(asked.logits)
        weights = ops.where(is_placed, self._weights(scores, experts), 0.0)
        return asked._replace(served=Served(experts, weights, is_placed))

    def looks_ahead(self, has_capacity: bool) -> str | None:
        return "`NoTokenLeftRouter` sends a token where later ones leave room"

    def _places(self, inputs: Tensor, training: bool | None) -> Size | None:
        count, load = ops.shape(inputs)[0], self.top_k / self.num_experts
        return self._capacity.of(count, load, training)

    def _granted(self, ranked: Tensor, mask: Tensor | None, capacity: Any) -> Tensor:
        """Which of a token's experts, ranked `(N, R)`, have a place for it: bool `(N, R)`."""
        rounds = ops.arange(self.rounds, dtype="int32")

        def asks(granted: Tensor) -> Tensor:
            count = ops.sum(ops.cast(granted, "int32"), axis=-1)
            return count < self.top_k if mask is None else ops.logical_and(mask, count < self.top_k)

        def is_open(turn: Tensor, granted: Tensor, free: Tensor) -> Tensor:
            return ops.logical_and(turn < self.rounds, ops.any(asks(granted)))

        def step(turn: Tensor, granted: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            wanted = ops.where(asks(granted), ops.take(ranked, turn, axis=1), self.num_experts)
            fits, free = _first_come_first_served(wanted, free)
            now = ops.logical_and(ops.expand_dims(fits, -1), ops.equal(rounds, turn))
            return turn + 1, ops.logical_or(granted, now), free

        turn = ops.zeros((), dtype="int32")
        granted = ops.zeros_like(ranked, dtype="bool")
        free = ops.zeros((self.num_experts,), dtype="int32") + ops.cast(capacity, "int32")
        return ops.while_loop(is_open, step, (turn, granted, free))[1]

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "capacity": self.capacity,
            "rounds": self.rounds,
        }


def _first_come_first_served(wanted: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Hands out the `free (E,)` places of experts to the tokens that want them.

    Args:
        wanted: int32 `(N,)`, an expert, or E for none.
        free: int32 `(E,)`.

    Returns:
        bool `(N,)` and int32 `(E,)`.
    """
    num_experts = free.shape[0]
    order = ops.cast(ops.argsort(wanted), "int32")  # stable: earlier tokens first
    in_order = ops.take(wanted, order)
    edges = edges_of(in_order, num_experts)
    position = ops.arange(ops.shape(wanted)[0], dtype="int32") - ops.take(edges, in_order)
    none = ops.zeros((1,), dtype="int32")
    fits = position < ops.take(ops.concatenate([free, none]), in_order)
    left = ops.maximum(free - (edges[1:] - edges[:-1]), 0)
    return ops.take(fits, ops.argsort(order)), left
