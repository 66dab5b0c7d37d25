"""The contract of routers, and the base of those with a kernel."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.initializers import FiniteInitializer
from keras_moe.core.numerics import as_float, softmax
from keras_moe.core.records import Routing
from keras_moe.core.seeds import SavesSeed
from keras_moe.core.types import (
    Config,
    ConstraintLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    Size,
    Tensor,
)
from keras_moe.dispatch import backend
from keras_moe.routers import losses
from keras_moe.routers.selection import load_of

# Left out of the record where nobody asks for them: each takes a pass over the tokens.
_ONLY_WHERE_ON = (
    "sequence_balance",
    "first_choice_balance",
    "local_entropy",
    "global_entropy",
    "sequence_importance",
    "sequence_load",
)


class Served(NamedTuple):
    """Places that a router with a capacity of its own has found for tokens.

    Attributes:
        experts: int32 `(N, k)`, distinct in each row, those with a place first.
        weights: float32 `(N, k)`.
        is_placed: bool `(N, k)`, False where there was no place, and at padding.
    """

    experts: Tensor
    weights: Tensor
    is_placed: Tensor


class Decision(NamedTuple):
    """Choice of a router for tokens `(N, d)`: all that a `Routing` is made of.

    Attributes:
        experts: int32 `(N, k)`, distinct in each row, best first.
        weights: float32 `(N, k)`, the weight of each chosen expert's output.
        logits: float32 `(N, E)`, the raw scores.
        probabilities: float32 `(N, E)`, each token's shares in the losses, which sum to 1.
        is_chosen: bool `(N, k)`, False where a token takes fewer than k experts; None for all.
        losses: auxiliary losses beside those that every router has, float32 scalars by name.
        served: what is left after drops, where `has_capacity`; None where nothing is dropped.
        amounts: what each token gives the experts, float32 `(N, E)`, by the name of the loss that
            keeps the experts' sums alike ("importance", "load"); None for a loss of 0.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor
    probabilities: Tensor
    is_chosen: Tensor | None = None
    losses: Mapping[str, Tensor] = {}
    served: Served | None = None
    amounts: Mapping[str, Tensor | None] = {}


class Router(SavesSeed):
    """Base of token-choice routers: tokens `(N, d)` in, a `Routing` out.

    A subclass says in `decide` where tokens go. The rest is done here: jitter, padding, the load,
    the losses. `LinearRouter` brings a kernel; then one method, `choose`, is enough. Every
    dispatcher, expert kind and metric works with the result.

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
        num_sequences: How many sequences of equal length the tokens are, in order, for losses of
            each sequence. Defaults to `1`.
        token_ids: Optional int32 `(N,)`, for a router that `needs_token_ids`.

    Returns:
        A `keras_moe.Routing` of shape `(N, k)`.

    Raises:
        ValueError: on losses that the class has not, and arguments out of range.
    """

    LOSSES: ClassVar[dict[str, float]] = {}
    AXES: tuple[tuple[str, ...], ...] = (
        ("kernel", "input width", "num_experts"),
        ("noise_kernel", "input width", "num_experts"),
        ("projection", "input width", "num_experts"),
        ("table", "vocabulary_size", "top_k"),
        ("bias", "num_experts"),
    )
    jitter = 0.0  # half the width of the noise that inputs are multiplied by in training
    draws_noise = False  # in training
    chooses_all = False  # every token goes to every expert
    chooses_tokens = False  # experts choose tokens, up to their capacity, and not the other way
    has_capacity = False  # of its own: it drops what finds no place
    serves_best_first = False  # slots go to tokens in the order of their largest weight
    fixes_top_k = False  # it cannot be changed later
    global_balance = False  # balance losses take the load of all replicas
    needs_token_ids = False  # `decide` takes `token_ids`, int32 `(N,)`

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
        self._top_k = checks.int_between("top_k", top_k, 1, self.num_experts, "num_experts")
        self.largest_top_k = self._top_k  # what the router was made with
        self.experts_per_token = self._top_k  # that are computed, on average
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

    @property
    def top_k(self) -> int:
        """Experts per token. Fewer than the router was made with may be set, as for inference.

        A compiled function keeps what it was compiled with: compile the model again. A saved model
        has the number that the router was made with.
        """
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        if self.fixes_top_k:
            raise AttributeError(
                f"`top_k` of `{type(self).__name__}` is fixed by its rule, or by a weight. "
                f"Received: top_k={top_k!r}"
            )
        most = self.largest_top_k
        self._top_k = checks.int_between("top_k", top_k, 1, most, "top_k of the constructor")
        self.experts_per_token = self._top_k

    @property
    def reads_sequences(self) -> bool:
        """Whether a loss is that of each sequence, for which `num_sequences` is needed."""
        return any(w and name.startswith("sequence_") for name, w in self.loss_weights.items())

    def reported_losses(self) -> tuple[str, ...]:
        """The names of `Routing.losses`: balance and z-loss always, others where they are on."""
        return tuple(dict.fromkeys(("balance", "z_loss", *self.loss_weights)))

    def probabilities(self, logits: Tensor) -> Tensor:
        """The share of each expert in the balance loss, `(N, E)`: softmax of the logits."""
        return softmax(logits)

    def looks_ahead(self, has_capacity: bool) -> str | None:
        """Says why a token's route depends on later ones, None where it does not."""
        if has_capacity and self.largest_top_k > 1:
            return (
                "under a capacity with `top_k` above 1, first choices of later tokens go before "
                "second choices of earlier ones"
            )
        return None

    def decide(self, inputs: Tensor, mask: Tensor | None, training: bool | None) -> Decision:
        """Says which experts each token goes to, and with which weights.

        Args:
            inputs: `(N, d)` tokens, jitter included.
            mask: bool `(N,)`, False at padding, or None; only a rule in which tokens depend on each
                other needs it.
            training: Whether noise is on.

        One that `needs_token_ids` takes them as one more argument, `token_ids=None`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `decide`.")

    def adapt(self, routing: Routing) -> None:
        """Changes what follows the load, after each training batch. By default nothing does."""

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        num_sequences: Size = 1,
        token_ids: Tensor | None = None,
    ) -> Routing:
        inputs = as_float(inputs, self.compute_dtype)
        if training and self.jitter:
            inputs = self._jittered(inputs)
        more = {"token_ids": token_ids} if self.needs_token_ids else {}
        with backend.current.without_autocast():
            decision = self.decide(inputs, mask, training, **more)
            routing = self._record(decision, mask, num_sequences)
        if training and not backend.current.is_recomputing():
            self.adapt(routing)
        return routing

    def _jittered(self, inputs: Tensor) -> Tensor:
        """Multiplies by U(1 - jitter, 1 + jitter), Switch Transformers section 2.2 and its code."""
        noise = keras.random.uniform(
            ops.shape(inputs),
            1.0 - self.jitter,
            1.0 + self.jitter,
            dtype="float32",
            seed=self.seed_generator,
        )
        return inputs * noise

    def _record(self, decision: Decision, mask: Tensor | None, num_sequences: Size) -> Routing:
        """The record of a decision, with padding left out, the load, and the losses."""
        experts, weights, logits = decision.experts, decision.weights, decision.logits
        asked = decision.is_chosen
        if asked is None:
            asked = ops.ones_like(experts, dtype="bool")
        if mask is not None:
            asked = ops.logical_and(asked, ops.expand_dims(mask, -1))
        load = load_of(experts, asked, self.num_experts)
        named = self._losses_of(decision, asked, load, mask, num_sequences)
        kept = asked
        if decision.served is not None:
            experts, weights, kept = decision.served
        return Routing(experts, weights, kept, asked, logits, load, named)

    def _losses_of(
        self,
        decision: Decision,
        asked: Tensor,
        load: Tensor,
        mask: Tensor | None,
        num_sequences: Size,
    ) -> dict[str, Tensor]:
        """The losses by name; those that take a pass over the tokens only where they are on."""
        probabilities, experts = decision.probabilities, decision.experts
        named = {
            "balance": losses.balance_loss(
                probabilities, load, self.top_k, mask, self.global_balance
            ),
            "z_loss": losses.z_loss(decision.logits, mask),
        }
        if self.loss_weights.get("sequence_balance"):
            named["sequence_balance"] = losses.sequence_balance_loss(
                probabilities, experts, asked, num_sequences, mask
            )
        if self.loss_weights.get("first_choice_balance"):
            first = load_of(experts[:, :1], asked[:, :1], self.num_experts)
            named["first_choice_balance"] = losses.balance_loss(
                probabilities, first, 1, mask, self.global_balance
            )
        if self.loss_weights.get("local_entropy"):
            named["local_entropy"] = losses.local_entropy_loss(probabilities, mask)
        if self.loss_weights.get("global_entropy"):
            named["global_entropy"] = losses.global_entropy_loss(probabilities, mask)
        for name, amounts in decision.amounts.items():
            named[name] = losses.cv_squared(amounts, mask)
            if self.loss_weights.get(f"sequence_{name}"):
                named[f"sequence_{name}"] = losses.sequence_cv_squared(amounts, num_sequences, mask)
        return {**named, **decision.losses}

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        num_sequences: Size = 1,
        token_ids: Tensor | None = None,
    ) -> Routing:
        return self.routing_spec(tuple(inputs.shape)[:-1])

    def routing_spec(self, leading: tuple[int | None, ...]) -> Routing:
        """The `Routing` of symbolic tensors whose token axes are `leading`."""

        def spec(last: int, dtype: str) -> Tensor:
            return keras.KerasTensor((*leading, last), dtype=dtype)

        return Routing(
            experts=spec(self.top_k, "int32"),
            weights=spec(self.top_k, "float32"),
            kept=spec(self.top_k, "bool"),
            asked=spec(self.top_k, "bool"),
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
            "top_k": self.largest_top_k,
            **({"losses": losses} if losses else {}),
            "seed": self.seed,
        }


class LinearRouter(Router):
    """Base of routers with a kernel: logits = tokens @ kernel (+ logit_bias), in float32.

    A subclass says in `choose` which experts a row of logits goes to, and with which weights.
    Other scores than a product with the kernel (cosines, a temperature) override `logits`.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`, the experts k each token goes to.
        losses: Optional dict of coefficients by name; the others keep their default. `"balance"`
            is the balance loss, 1 at perfect balance; `"z_loss"` the router z-loss;
            `"sequence_balance"` the balance loss of each sequence on its own (DeepSeek-V3: 1e-4);
            `"first_choice_balance"` the balance loss in which only first choices count (GShard);
            `"local_entropy"` the mean entropy of a token's probabilities, over ln E, which makes
            the router sure; `"global_entropy"` 1 minus the entropy of the mean probabilities, over
            ln E, which makes it use all experts (both LIMoE). Defaults to `None`: 0.01 (Switch),
            0.001 (ST-MoE), and 0 for the others.
        jitter: Float in [0, 1). In training the router's inputs (never the experts') are
            multiplied by noise drawn from U(1 - jitter, 1 + jitter). Defaults to `0.0`.
        use_bias: Whether a trained bias, 0 at first, is added to the logits (GPT-OSS). Defaults to
            `False`.
        global_balance: Whether the balance losses take the load of all replicas, under a
            `tf.distribute` strategy or `torch.distributed`, and not of each replica's own part of
            the batch (Qiu et al. 2025). On JAX they always do. Defaults to `False`.
        kernel_initializer: Initializer of the `(d, E)` kernel. Defaults to `None`, a normal
            distribution of standard deviation 0.02 (flaxformer's setting for Switch).
        kernel_regularizer: Optional regularizer of the kernel. Defaults to `None`.
        kernel_constraint: Optional constraint of the kernel. Defaults to `None`.
        seed: Optional integer, seed of the jitter. Defaults to `None`.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "balance": 0.01,
        "z_loss": 0.001,
        "sequence_balance": 0.0,
        "first_choice_balance": 0.0,
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
        use_bias: bool = False,
        global_balance: bool = False,
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
        self.use_bias = bool(use_bias)
        self.global_balance = bool(global_balance)
        if self.global_balance and not {"balance", "first_choice_balance"} & set(self.LOSSES):
            checks.fail(
                f"`{type(self).__name__}` has no balance loss and no use for `global_balance`.",
                global_balance=global_balance,
            )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape(type(self).__name__, tuple(input_shape))
        self.kernel = self.add_weight(
            name="kernel",
            shape=(width, self.num_experts),
            initializer=FiniteInitializer(self.kernel_initializer, "router/kernel"),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        if self.use_bias:
            # Not "bias", which is a selection bias's name.
            self.logit_bias = self.add_weight(
                name="logit_bias", shape=(self.num_experts,), initializer="zeros"
            )

    def logits(self, inputs: Tensor) -> Tensor:
        """Computes the scores of tokens, float32 `(N, E)`: inputs @ kernel (+ logit_bias).

        Choices, weights and losses follow it.

        Args:
            inputs: `(N, d)` tokens, jitter included.

        One that `needs_token_ids` takes them as one more argument, `token_ids=None`.
        """
        logits = ops.matmul(inputs, self.kernel)
        return logits + self.logit_bias if self.use_bias else logits

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the chosen experts, int32 `(N, k)`, and their weights, float32 `(N, k)`.

        Args:
            logits: float32 `(N, E)`.
            probabilities: float32 `(N, E)`, what `probabilities` gives: softmax of the logits.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `choose`.")

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        logits = self.logits(inputs, **more)
        probabilities = self.probabilities(logits)
        experts, weights = self.choose(logits, probabilities)
        return Decision(experts, weights, logits, probabilities)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "jitter": self.jitter,
            "use_bias": self.use_bias,
            "global_balance": self.global_balance,
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
        if name in ("top_k", "jitter", "seed", "use_bias") or name.startswith("kernel_"):
            checks.fail(f"`{router.__name__}` has no use for `{name}`.", **{name: value})


def refuse_top_k(router: type[Router], kwargs: dict[str, Any]) -> None:
    """Fails where a router that fixes its number of experts per token is given one."""
    if "top_k" in kwargs:
        checks.fail(f"`{router.__name__}` has no use for `top_k`.", top_k=kwargs["top_k"])
