"""The contract of routers."""

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._numerics import softmax
from keras_moe._seeds import SavesSeed
from keras_moe.initializers import FiniteInitializer
from keras_moe.routers import losses
from keras_moe.routers.selection import load_of
from keras_moe.routing import Routing
from keras_moe.types import Config, ConstraintLike, InitializerLike, RegularizerLike, Tensor


class Router(SavesSeed):
    """Base of token-choice routers: tokens `(N, d)` in, a `Routing` out.

    logits = tokens @ kernel, in float32 whatever the dtype policy (there is no bias). A subclass
    says in `choose` which experts a row of logits goes to, and with which weights; losses, load and
    padding are handled here, and every carrier, expert kind and metric works with the result.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`, the experts k each token goes to.
        jitter: Float in [0, 1). In training the router's inputs (never the experts') are
            multiplied by noise drawn from U(1 - jitter, 1 + jitter). Defaults to `0.0`.
        balance_weight: Coefficient of the balance loss. Defaults to `0.01`.
        z_loss_weight: Coefficient of the router z-loss. Defaults to `0.001`.
        sequence_balance_weight: Coefficient of the balance loss of each sequence on its own
            (DeepSeek-V3: 1e-4), 1 at perfect balance. Defaults to `0.0`.
        local_entropy_weight: Coefficient of the mean entropy of a token's probabilities, over ln E
            (LIMoE), which makes the router sure. Defaults to `0.0`.
        global_entropy_weight: Coefficient of 1 minus the entropy of the mean probabilities, over
            ln E (LIMoE), which makes it use all experts. Defaults to `0.0`.
        kernel_initializer: Initializer of the `(d, E)` kernel. Defaults to `None`, a normal
            distribution of standard deviation 0.02 (flaxformer's setting for Switch).
        kernel_regularizer: Optional regularizer of the kernel. Defaults to `None`.
        kernel_constraint: Optional constraint of the kernel. Defaults to `None`.
        seed: Optional integer, seed of the jitter. Defaults to `None`.

    Call arguments:
        inputs: `(N, d)` tokens.
        mask: bool `(N,)`, False at padding, or None.
        training: Whether jitter is on.

    Returns:
        A `keras_moe.Routing` of shape `(N, k)`.
    """

    draws_noise = False  # in training, besides the jitter
    chooses_tokens = False  # experts choose tokens, up to their capacity, and not the other way
    has_capacity = False  # of its own: it drops what finds no place
    needs_token_ids = False  # `call` takes `token_ids`, integers `(N,)`

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        jitter: float = 0.0,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.001,
        sequence_balance_weight: float = 0.0,
        local_entropy_weight: float = 0.0,
        global_entropy_weight: float = 0.0,
        kernel_initializer: InitializerLike = None,
        kernel_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["dtype"] = "float32"  # bfloat16 logits change the choice of 1 to 5 % of tokens
        super().__init__(**kwargs)
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.top_k = _checks.int_between("top_k", top_k, 1, self.num_experts, "num_experts")
        self.experts_per_token = self.top_k  # that are computed, on average
        self.jitter = _checks.rate("jitter", jitter)
        self.balance_weight = _checks.non_negative("balance_weight", balance_weight)
        self.z_loss_weight = _checks.non_negative("z_loss_weight", z_loss_weight)
        self.sequence_balance_weight = _checks.non_negative(
            "sequence_balance_weight", sequence_balance_weight
        )
        self.local_entropy_weight = _checks.non_negative(
            "local_entropy_weight", local_entropy_weight
        )
        self.global_entropy_weight = _checks.non_negative(
            "global_entropy_weight", global_entropy_weight
        )
        self.kernel_initializer = keras.initializers.get(
            keras.initializers.RandomNormal(stddev=0.02)
            if kernel_initializer is None
            else kernel_initializer
        )
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.seed = _checks.optional(_checks.integer, "seed", seed)
        has_noise = self.jitter or self.draws_noise
        self.seed_generator = keras.random.SeedGenerator(seed) if has_noise else None
        self.supports_masking = True

    @property
    def loss_weights(self) -> dict[str, float]:
        """Coefficient of each entry of `Routing.losses`; those that are off have none."""
        optional = {
            "sequence_balance": self.sequence_balance_weight,
            "local_entropy": self.local_entropy_weight,
            "global_entropy": self.global_entropy_weight,
        }
        return {
            "balance": self.balance_weight,
            "z_loss": self.z_loss_weight,
            **{name: weight for name, weight in optional.items() if weight},
        }

    def build(self, input_shape: Any) -> None:
        width = _checks.token_shape(type(self).__name__, tuple(input_shape))
        self.kernel = self.add_weight(
            name="kernel",
            shape=(width, self.num_experts),
            initializer=FiniteInitializer(self.kernel_initializer, "router/kernel"),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """The share of each expert in the balance loss, `(N, E)`: softmax of the logits."""
        return softmax(logits)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the chosen experts, int32 `(N, k)`, and their weights, float32 `(N, k)`.

        Args:
            logits: float32 `(N, E)`.
            probabilities: float32 `(N, E)`, what `probabilities` gives: softmax of the logits.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `choose`.")

    def priority(self, routing: Routing) -> Tensor | None:
        """Whose assignments get the slots of an expert first: a number per token `(N,)`, larger
        ones first; None for the order in which the tokens stand."""
        del routing
        return None

    def before_drops(self, routing: Routing, mask: Tensor | None) -> Routing:
        """What the router asked for, where its record holds what was left after drops."""
        del mask
        return routing

    def by_sequence(
        self, routing: Routing, num_sequences: int | Tensor, mask: Tensor | None
    ) -> Routing:
        """The record of tokens that are `num_sequences` sequences of equal length, and not one."""
        if not self.sequence_balance_weight:
            return routing
        asked = self.before_drops(routing, mask)
        shares = self.probabilities(routing.logits)
        loss = losses.sequence_balance_loss(shares, asked.experts, asked.kept, num_sequences, mask)
        return routing._replace(losses={**routing.losses, "sequence_balance": loss})

    def call(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None
    ) -> Routing:
        logits = ops.matmul(self._jittered(inputs) if training else inputs, self.kernel)
        probabilities = self.probabilities(logits)
        experts, weights = self.choose(logits, probabilities)
        return self.record(experts, weights, logits, probabilities, mask)

    def record(
        self,
        experts: Tensor,
        weights: Tensor,
        logits: Tensor,
        probabilities: Tensor,
        mask: Tensor | None,
        *,
        is_chosen: Tensor | None = None,
        more_losses: dict[str, Tensor] | None = None,
    ) -> Routing:
        """The `Routing` of a decision, with padding left out, the load, and the losses.

        Args:
            experts: int32 `(N, k)`, distinct in each row.
            weights: float32 `(N, k)`.
            logits: float32 `(N, E)`.
            probabilities: float32 `(N, E)`, the shares in the balance loss.
            mask: bool `(N,)`, False at padding, or None.
            is_chosen: bool `(N, k)`, False where a token takes fewer than k experts. Defaults to
                `None`, for all.
            more_losses: the losses beside "balance" and "z_loss" that `loss_weights` names.
        """
        kept = ops.ones_like(experts, dtype="bool") if is_chosen is None else is_chosen
        if mask is not None:
            kept = ops.logical_and(kept, ops.expand_dims(mask, -1))
        load = load_of(experts, kept, self.num_experts)
        return Routing(
            experts=experts,
            weights=weights,
            kept=kept,
            logits=logits,
            load=load,
            losses={
                "balance": losses.balance_loss(probabilities, load, self.top_k, mask),
                "z_loss": losses.z_loss(logits, mask),
                **self._optional_losses(probabilities, experts, kept, mask),
                **(more_losses or {}),
            },
        )

    def _optional_losses(
        self, probabilities: Tensor, experts: Tensor, kept: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Those that are on; all tokens count as one sequence until `by_sequence` says more."""
        found = {}
        if self.sequence_balance_weight:
            found["sequence_balance"] = losses.sequence_balance_loss(
                probabilities, experts, kept, 1, mask
            )
        if self.local_entropy_weight:
            found["local_entropy"] = losses.local_entropy_loss(probabilities, mask)
        if self.global_entropy_weight:
            found["global_entropy"] = losses.global_entropy_loss(probabilities, mask)
        return found

    def compute_output_spec(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None
    ) -> Routing:
        del mask, training
        return self.routing_spec(tuple(inputs.shape)[:-1])

    def routing_spec(self, leading: tuple[int | None, ...]) -> Routing:
        """The `Routing` of symbolic tensors whose token axes are `leading`."""

        def spec(last: int, dtype: str) -> Tensor:
            return keras.KerasTensor((*leading, last), dtype=dtype)

        return Routing(
            experts=spec(self.top_k, "int32"),
            weights=spec(self.top_k, "float32"),
            kept=spec(self.top_k, "bool"),
            logits=spec(self.num_experts, "float32"),
            load=keras.KerasTensor((self.num_experts,), dtype="float32"),
            losses={name: keras.KerasTensor((), dtype="float32") for name in self.loss_weights},
        )

    def _jittered(self, tokens: Tensor) -> Tensor:
        """Multiplies by U(1 - jitter, 1 + jitter), Switch Transformers section 2.2 and its code."""
        if not self.jitter:
            return tokens
        noise = keras.random.uniform(
            ops.shape(tokens),
            1.0 - self.jitter,
            1.0 + self.jitter,
            dtype="float32",
            seed=self.seed_generator,
        )
        return tokens * noise

    def get_config(self) -> Config:
        config: Config = super().get_config()
        return {
            **config,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "jitter": self.jitter,
            "balance_weight": self.balance_weight,
            "z_loss_weight": self.z_loss_weight,
            "sequence_balance_weight": self.sequence_balance_weight,
            "local_entropy_weight": self.local_entropy_weight,
            "global_entropy_weight": self.global_entropy_weight,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "seed": self.seed,
        }
