"""The contract of routers, and the base of those with a kernel."""

from collections.abc import Mapping
from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.initializers import FiniteInitializer
from keras_moe.core.numerics import softmax
from keras_moe.core.records import Routing
from keras_moe.core.seeds import SavesSeed
from keras_moe.core.types import Config, ConstraintLike, InitializerLike, RegularizerLike, Tensor
from keras_moe.routers import losses
from keras_moe.routers.selection import load_of

# Left out of the record where nobody asks for them: each takes a pass over the tokens.
_ONLY_WHERE_ON = ("sequence_balance", "local_entropy", "global_entropy")


class Router(SavesSeed):
    """Base of token-choice routers: tokens `(N, d)` in, a `Routing` out.

    A subclass decides in `call` where tokens go and returns what `record` makes of it: padding left
    out, the load, and the losses. `LinearRouter` brings a kernel; then one method, `choose`, is
    enough. Every dispatcher, expert kind and metric works with the result.

    `LOSSES` are the auxiliary losses that a class has, by name, with their default coefficients.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`, the experts k each token goes to.
        losses: Optional dict of coefficients by name, of some of `LOSSES`; the others keep their
            default. Defaults to `None`.
        seed: Optional integer, seed of what the router draws. Defaults to `None`.

    Call arguments:
        inputs: `(N, d)` tokens.
        mask: bool `(N,)`, False at padding, or None.
        training: Whether noise is on.

    Returns:
        A `keras_moe.Routing` of shape `(N, k)`.

    Raises:
        ValueError: on losses that the class has not, and arguments out of range.
    """

    LOSSES: ClassVar[dict[str, float]] = {}
    draws_noise = False  # in training
    chooses_tokens = False  # experts choose tokens, up to their capacity, and not the other way
    has_capacity = False  # of its own: it drops what finds no place
    needs_token_ids = False  # `call` takes `token_ids`, integers `(N,)`

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        losses: Mapping[str, float] | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_arguments_of_others(type(self), kwargs)
        kwargs["dtype"] = "float32"  # bfloat16 logits change the choice of 1 to 5 % of tokens
        super().__init__(**kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self.top_k = checks.int_between("top_k", top_k, 1, self.num_experts, "num_experts")
        self.experts_per_token = self.top_k  # that are computed, on average
        self.loss_weights = self._coefficients(losses)
        self.seed = checks.optional(checks.integer, "seed", seed)
        self.seed_generator = keras.random.SeedGenerator(seed) if self.draws_noise else None
        self.supports_masking = True

    def _coefficients(self, losses: Mapping[str, float] | None) -> dict[str, float]:
        """The coefficient of each loss of the class, checked."""
        losses = {} if losses is None else losses
        if not isinstance(losses, Mapping) or not set(losses) <= set(self.LOSSES):
            name = type(self).__name__
            known = f"some of {sorted(self.LOSSES)}" if self.LOSSES else "nothing: it has none"
            checks.fail(
                f"`losses` of `{name}` must be a dict of coefficients of {known}.", losses=losses
            )
        weights = {
            name: checks.non_negative(f"losses[{name!r}]", losses.get(name, default))
            for name, default in self.LOSSES.items()
        }
        return {name: w for name, w in weights.items() if w or name not in _ONLY_WHERE_ON}

    def reported_losses(self) -> tuple[str, ...]:
        """The names of `Routing.losses`: balance and z-loss always, others where they are on."""
        return tuple(dict.fromkeys(("balance", "z_loss", *self.loss_weights)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The share of each expert in the balance loss, `(N, E)`: softmax of the logits."""
        return softmax(logits)

    def looks_ahead(self, has_capacity: bool) -> str | None:
        """Says why a token's route depends on later ones, None where it does not."""
        del has_capacity
        return None

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
        if not self.loss_weights.get("sequence_balance"):
            return routing
        asked = self.before_drops(routing, mask)
        shares = self.probabilities(routing.logits)
        loss = losses.sequence_balance_loss(shares, asked.experts, asked.kept, num_sequences, mask)
        return routing._replace(losses={**routing.losses, "sequence_balance": loss})

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
        if self.loss_weights.get("sequence_balance"):
            found["sequence_balance"] = losses.sequence_balance_loss(
                probabilities, experts, kept, 1, mask
            )
        if self.loss_weights.get("local_entropy"):
            found["local_entropy"] = losses.local_entropy_loss(probabilities, mask)
        if self.loss_weights.get("global_entropy"):
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
            losses={
                name: keras.KerasTensor((), dtype="float32") for name in self.reported_losses()
            },
        )

    def get_config(self) -> Config:
        config: Config = super().get_config()
        losses = {name: self.loss_weights.get(name, 0.0) for name in self.LOSSES}
        return {
            **config,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            **({"losses": losses} if losses else {}),
            "seed": self.seed,
        }


class LinearRouter(Router):
    """Base of routers with a kernel: logits = tokens @ kernel, in float32 and without a bias.

    A subclass says in `choose` which experts a row of logits goes to, and with which weights.
    Other scores than a product with the kernel (cosines, a temperature) override `logits`.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`, the experts k each token goes to.
        losses: Optional dict of coefficients by name; the others keep their default. `"balance"`
            is the balance loss, 1 at perfect balance; `"z_loss"` the router z-loss;
            `"sequence_balance"` the balance loss of each sequence on its own (DeepSeek-V3: 1e-4);
            `"local_entropy"` the mean entropy of a token's probabilities, over ln E, which makes
            the router sure; `"global_entropy"` 1 minus the entropy of the mean probabilities, over
            ln E, which makes it use all experts (both LIMoE). Defaults to `None`: 0.01 (Switch),
            0.001 (ST-MoE), and 0 for the others.
        jitter: Float in [0, 1). In training the router's inputs (never the experts') are
            multiplied by noise drawn from U(1 - jitter, 1 + jitter). Defaults to `0.0`.
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

    LOSSES: ClassVar[dict[str, float]] = {
        "balance": 0.01,
        "z_loss": 0.001,
        "sequence_balance": 0.0,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
    }

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        losses: Mapping[str, float] | None = None,
        jitter: float = 0.0,
        kernel_initializer: InitializerLike = None,
        kernel_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kernel_initializer is None:  # before the noise: each draws a seed where none is given
            kernel_initializer = keras.initializers.RandomNormal(stddev=0.02)
        super().__init__(num_experts, top_k, losses=losses, seed=seed, **kwargs)
        self.jitter = checks.rate("jitter", jitter)
        if self.jitter and self.seed_generator is None:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)

    def build(self, input_shape: Any) -> None:
        width = checks.token_shape(type(self).__name__, tuple(input_shape))
        self.kernel = self.add_weight(
            name="kernel",
            shape=(width, self.num_experts),
            initializer=FiniteInitializer(self.kernel_initializer, "router/kernel"),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    def logits(self, inputs: Tensor) -> Tensor:
        """The scores of tokens `(N, d)`, float32 `(N, E)`."""
        return ops.matmul(inputs, self.kernel)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the chosen experts, int32 `(N, k)`, and their weights, float32 `(N, k)`.

        Args:
            logits: float32 `(N, E)`.
            probabilities: float32 `(N, E)`, what `probabilities` gives: softmax of the logits.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `choose`.")

    def call(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None
    ) -> Routing:
        logits = self.logits(self.jittered(inputs, training))
        probabilities = self.probabilities(logits)
        experts, weights = self.choose(logits, probabilities)
        return self.record(experts, weights, logits, probabilities, mask)

    def jittered(self, inputs: Tensor, training: bool | None) -> Tensor:
        """Multiplies by U(1 - jitter, 1 + jitter), Switch Transformers section 2.2 and its code."""
        if not training or not self.jitter:
            return inputs
        noise = keras.random.uniform(
            ops.shape(inputs),
            1.0 - self.jitter,
            1.0 + self.jitter,
            dtype="float32",
            seed=self.seed_generator,
        )
        return inputs * noise

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "jitter": self.jitter,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
        }


def refuse_arguments_of_others(router: type[Router], kwargs: dict[str, Any]) -> None:
    """Says what to do instead of an argument that other routers have, or have had."""
    for name, value in kwargs.items():
        if name.endswith("_weight"):
            loss = name.removesuffix("_weight")
            has = sorted(router.LOSSES)
            checks.fail(
                f"`{router.__name__}` takes the coefficients of its losses as a dict: "
                + (f"`losses={{{loss!r}: ...}}`." if loss in has else f"of {has}, without {loss}."),
                **{name: value},
            )
        if name in ("top_k", "jitter", "seed") or name.startswith("kernel_"):
            checks.fail(f"`{router.__name__}` has no use for `{name}`.", **{name: value})


def refuse_top_k(router: type[Router], kwargs: dict[str, Any]) -> None:
    """Fails where a router that fixes its number of experts per token is given one."""
    if "top_k" in kwargs:
        checks.fail(f"`{router.__name__}` has no use for `top_k`.", top_k=kwargs["top_k"])
