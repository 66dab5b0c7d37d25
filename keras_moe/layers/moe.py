"""The sparse mixture-of-experts layer."""

import dataclasses
import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import keras
from keras import ops
from keras.src.backend import get_keras_mask

from keras_moe import routers
from keras_moe.core import checks
from keras_moe.core.capacity import capacity_of
from keras_moe.core.exporting import exporting
from keras_moe.core.numerics import as_float
from keras_moe.core.records import Routing
from keras_moe.core.types import (
    Activation,
    Axes,
    Config,
    ConstraintLike,
    ExpertsLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    Size,
    Tensor,
)
from keras_moe.dispatch import Dispatcher, DispatchPlan, backend, choose
from keras_moe.dispatch.dispatcher import kept_best_first
from keras_moe.layers.counts import RoutingCounts, check_built
from keras_moe.layers.division import divided
from keras_moe.layers.expert_mlp import ExpertMLP
from keras_moe.layers.feed_forward import ExpertFeedForward
from keras_moe.layers.freezing import freeze_parts
from keras_moe.layers.losses import AddsRouterLosses
from keras_moe.layers.router_checks import check_router
from keras_moe.layers.sublayers import adopt, build_once, check_free, config_of, name_or_default
from keras_moe.layers.tokens import (
    flat_mask,
    flat_token_ids,
    kept_examples,
    pool_examples,
    spread_over_tokens,
    with_axes,
    zero_where_padded,
)

_WEIGHED = ("inputs", "outputs")
_LEVELS = ("token", "example")
_GROUPS = ("batch", "example")


@keras.saving.register_keras_serializable(package="keras_moe")
class MoE(AddsRouterLosses, ExpertFeedForward):
    """Sends each token to k of E expert networks and sums their weighted outputs.

    y[n] = sum_j weights[n,j] * expert_{experts[n,j]}(x[n])  (+ sum of shared experts)
    expert_e(x) = act(x @ kernel_0[e] + bias_0[e]) @ kernel_1[e] + bias_1[e]

    The cost is that of the chosen experts, not of all of them. A dropped token's output is exactly
    0 (the residual belongs to the block around the layer), a padded one's too.

    Args:
        num_experts: Positive integer, the number of experts E.
        hidden_dim: Positive integer, the hidden width h of each expert. Only `None` where `experts`
            are Keras layers. Defaults to `None`.
        top_k: Integer between 1 and `num_experts`, the experts per token k. None for 2, or for
            what a router fixes: "switch" (1), "dense" and "uniform" (all), a `Router` object.
            Defaults to `None`.
        router: `"top_k"`, `"switch"`, `"noisy_top_k"`, `"batch_priority"`, `"no_token_left"`,
            `"sigmoid_bias"`, `"sinkhorn"`, `"expert_choice"`, `"relu"`, `"dselect_k"`, `"dense"`,
            `"hash"`, `"random"`, `"uniform"`, a config or a `keras_moe.routers.Router`, which then
            brings its own loss coefficients. Defaults to `"top_k"`.
        experts: `"mlp"`, `"glu"` (gated hidden layer), a bank such as `ExpertMLP`, a Keras layer
            of which E copies with new random weights are made (`LayerExperts(copy_weights=True)`
            keeps trained ones), the config of one of these, or a list of E Keras layers; what the
            layer does not build itself takes none of the arguments below that describe experts.
            Defaults to `"mlp"`.
        num_shared_experts: Integer of at least 0, experts that every token passes through, added
            unweighted. Defaults to `0`.
        weigh: `"outputs"`: a token's weights multiply what experts give; `"inputs"`: what they read
            (Llama 4), y[n] = sum_j expert_{experts[n,j]}(weights[n,j] x[n]). Defaults to
            `"outputs"`.
        capacity: Positive integer or None. Slots per expert C of each capacity group, at most its
            tokens; what does not fit is dropped. Not with a `capacity_factor`. Defaults to `None`.
        capacity_factor: Positive float or None. Slots per expert C =
            ceil(capacity_factor * k * N / E), N the tokens of the capacity group, padding included.
            With neither, nothing is dropped; where experts choose their tokens the factor is then
            1. Defaults to `None`.
        eval_capacity_factor: The same at inference; None for the same as in training. Defaults to
            `None`.
        output_dim: Positive integer, the output width; None for the inputs' width d. Defaults to
            `None`.
        activation: Activation of the experts' hidden layer. Defaults to `"gelu"`.
        use_bias: Whether experts have biases; the router's is its own `use_bias`. Defaults to
            `True`.
        dropout: Float in [0, 1), dropout after the experts' hidden layer. Defaults to `0.0`.
        balance_weight: Coefficient of the balance loss, which is 1 at perfect balance, of a named
            router that has one; None for the router's own, 0.01 (Switch) unless it balances
            otherwise. Defaults to `None`.
        z_loss_weight: Coefficient of the router z-loss of a named router that has one; None for
            the router's own, 0.001 (ST-MoE) or, where its paper has none, 0. Defaults to `None`.
        routing_level: `"token"`: each token is routed on its own; `"example"`: one decision per
            example, from the mean of its unmasked tokens. Defaults to `"token"`.
        capacity_group: `"batch"` or `"example"`: whether tokens compete for slots in the whole
            batch or inside their example (which, with inputs `(batch, d)`, is one token with at
            least one slot in every expert). Defaults to `"batch"`.
        dispatch: `"auto"`, `"walk"`, `"padded_blocks"`, `"grouped"`, `"lookup"`, `"dense"`,
            `"slots"`, `"einsum"`, a config or a `keras_moe.dispatch.Dispatcher`. Defaults to
            `"auto"`.
        kernel_initializer: Initializer of one expert's kernels. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of one expert's biases. Defaults to `"zeros"`.
        kernel_regularizer: Optional regularizer, called with the experts' stacked kernels.
            Defaults to `None`.
        bias_regularizer: Optional regularizer, called with the experts' stacked biases. Defaults to
            `None`.
        kernel_constraint: Optional constraint of one expert's kernels. Defaults to `None`.
        bias_constraint: Optional constraint of one expert's biases. Defaults to `None`.
        seed: Optional integer, seed of dropout and router noise. Defaults to `None`.

    Call arguments:
        inputs: `(..., d)` of rank 2 or more.
        mask: Optional bool `(...)`, False at padding, which takes no capacity and no part in
            losses.
        training: Whether dropout, noise, the training capacity and counting are on.
        return_routing: Whether to return the `keras_moe.Routing` too. Defaults to `False`.
        token_ids: Optional int `(...)`, the ids of the tokens, which `TokenHashRouter` needs and
            other routers ignore.

    Input shape:
        `(batch, ..., d)`

    Output shape:
        `(batch, ..., output_dim)`

    Returns:
        The outputs, or the outputs and the `Routing` with `return_routing=True`.

    Raises:
        ValueError: on arguments out of range, an unknown router, experts or dispatch name, inputs
            of rank 1, a mask or token ids that have not one entry per token, or missing token ids.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.MoE(num_experts=8, hidden_dim=64, top_k=2)
    >>> tuple(layer(np.zeros((4, 10, 16), "float32")).shape)
    (4, 10, 16)

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2; Fedus et al. 2021,
        "Switch Transformers", section 2 (capacity, balance loss).
    """

    parts = ("router", "experts", "shared_experts")
    AXES = (("load", "limbs", "num_experts"),)
    _rule: type[routers.Router] | None = routers.TopKRouter
    takes_router = True  # whether there is an argument `router`

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        top_k: int | None = None,
        router: routers.Router | str | Config = "top_k",
        experts: ExpertsLike = "mlp",
        num_shared_experts: int = 0,
        weigh: str = "outputs",
        capacity: int | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        output_dim: int | None = None,
        activation: Activation = "gelu",
        use_bias: bool = True,
        dropout: float = 0.0,
        balance_weight: float | None = None,
        z_loss_weight: float | None = None,
        routing_level: str = "token",
        capacity_group: str = "batch",
        dispatch: Dispatcher | str | Config = "auto",
        kernel_initializer: InitializerLike = "glorot_uniform",
        bias_initializer: InitializerLike = "zeros",
        kernel_regularizer: RegularizerLike = None,
        bias_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        bias_constraint: ConstraintLike = None,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_experts,
            hidden_dim,
            experts=experts,
            output_dim=output_dim,
            activation=activation,
            use_bias=use_bias,
            dropout=dropout,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            seed=seed,
            describes_others=bool(num_shared_experts),
            name=name_or_default(name, "moe"),
            **kwargs,
        )
        self._set_shared_experts(num_shared_experts)
        self.weigh = checks.one_of("weigh", weigh, _WEIGHED)
        self._capacity = capacity_of(capacity, capacity_factor, eval_capacity_factor)
        self.capacity, self.capacity_factor = self._capacity.slots, self._capacity.factor
        self.eval_capacity_factor = self._capacity.eval_factor
        self._set_levels(routing_level, capacity_group)
        self._set_router(router, top_k, balance_weight, z_loss_weight)
        self._set_dispatcher(dispatch)
        check_free(self.router, self.experts)
        adopt(self.router, "router")
        self._make_experts()
        freeze_parts(self)

    def _set_shared_experts(self, number: int) -> None:
        self.num_shared_experts = checks.int_at_least("num_shared_experts", number, 0)
        self.shared_experts: ExpertMLP | None = None
        if self.num_shared_experts and self.hidden_dim is None:
            checks.fail(
                "`hidden_dim` must be a positive integer where there are shared experts.",
                hidden_dim=None,
            )

    def _set_levels(self, routing_level: str, capacity_group: str) -> None:
        self.routing_level = checks.one_of("routing_level", routing_level, _LEVELS)
        self.capacity_group = checks.one_of("capacity_group", capacity_group, _GROUPS)
        if routing_level == capacity_group == "example":
            checks.fail(
                "`capacity_group` must be 'batch' where `routing_level` is 'example': all tokens "
                "of an example go to the same experts and would fill their slots.",
                capacity_group=capacity_group,
            )

    def _set_router(
        self,
        router: routers.Router | str | Config,
        top_k: int | None,
        balance_weight: float | None,
        z_loss_weight: float | None,
    ) -> None:
        """Makes the router; fails where it cannot do what the layer is asked for."""
        self._router_argument = router
        self._router_arguments = {
            "top_k": checks.optional(checks.positive_int, "top_k", top_k),
            "balance_weight": checks.optional(
                checks.non_negative, "balance_weight", balance_weight
            ),
            "z_loss_weight": checks.optional(checks.non_negative, "z_loss_weight", z_loss_weight),
        }
        arguments: dict[str, Any] = self._router_arguments
        self.router = router = routers.get(
            router,
            num_experts=self.num_experts,
            **arguments,
            capacity=self.capacity,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            seed=self.seed,
        )
        check_router(router, self._capacity, self.routing_level, self.capacity_group)

    def _set_dispatcher(self, dispatch: Dispatcher | str | Config) -> None:
        self._dispatch_argument = dispatch
        self.dispatcher: Dispatcher | None = choose.get(
            dispatch,
            has_capacity=self.has_capacity,
            chooses_tokens=self.router.chooses_tokens,
        )

    def _make_experts(self) -> None:
        super()._make_experts()
        if self.num_shared_experts:
            self.shared_experts = self._mlp(self.num_shared_experts, "shared_experts")

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("MoE", tuple(input_shape))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})
        build_once(self.router, (None, width))
        self._build_experts(width)
        if self.shared_experts is not None:
            hidden, _ = self.shared_experts.units
            self.shared_experts._units = (hidden, self._output_width(width))
            self.shared_experts.build((1, None, width))
        self._counts = RoutingCounts(self, self.num_experts)
        self._build_losses()

    # === The forward pass ===

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
        token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Routing]:
        if mask is None:  # Keras hands on that of the inputs, but not where there are token ids too
            mask = get_keras_mask(inputs)
        with exporting() if backend.current.is_traced_for_export() else nullcontext():
            return self._forward(inputs, mask, training, return_routing, token_ids)

    def _forward(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        training: bool | None,
        return_routing: bool,
        token_ids: Tensor | None,
    ) -> Tensor | tuple[Tensor, Routing]:
        inputs = as_float(inputs, self.compute_dtype)
        axes = ops.shape(inputs)[:-1]
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        if mask is not None:
            mask = flat_mask("MoE", inputs, mask, (-1,))
            tokens = zero_where_padded(tokens, mask)
        if self.router.needs_token_ids:
            token_ids = flat_token_ids("MoE", inputs, token_ids)

        decision, routing = self._route(tokens, mask, axes, training, token_ids)
        losses = self._add_losses(decision)
        run = partial(self._run_experts, training=training)
        if backend.current.DIVIDES:  # among the devices of a distribution, if there is one
            run = partial(divided, run, self)
        outputs, kept = run(tokens, routing, axes)
        asked = kept if self.router.chooses_tokens else routing.asked
        routing = routing._replace(kept=kept, asked=asked)
        if self._is_counted(training):
            self._counts.add(decision, routing, losses)

        if self.shared_experts is not None:
            shared = self.shared_experts(ops.expand_dims(tokens, 0), training=training)
            outputs = outputs + ops.sum(shared, axis=0)
        if mask is not None:
            outputs = zero_where_padded(outputs, mask)
        outputs = ops.cast(outputs, self.compute_dtype)
        outputs = ops.reshape(outputs, (*axes, outputs.shape[-1]))
        if return_routing or self.recorder is not None:
            record = self._returned_routing(decision, routing, axes)
            if self.recorder is not None:
                self.recorder(record)
        return (outputs, record) if return_routing else outputs

    def _route(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        axes: Axes,
        training: bool | None,
        token_ids: Tensor | None,
    ) -> tuple[Routing, Routing]:
        """Returns the router's decision, and what it means for each token."""
        if self.routing_level == "example":
            pooled, example_mask = pool_examples(tokens, mask, axes)
            decision = self.router(pooled, mask=example_mask, training=training)
            return decision, spread_over_tokens(decision, mask, axes)
        more = {}
        if self.router.needs_token_ids:
            more["token_ids"] = token_ids
        if self.router.reads_sequences:
            more["num_sequences"] = axes[0]
        decision = self.router(tokens, mask=mask, training=training, **more)
        return decision, decision

    def _run_experts(
        self, tokens: Tensor, routing: Routing, axes: Axes, training: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the experts' weighted sums and the kept assignments."""
        num_experts = self.experts.num_experts  # of this device, where devices divide them
        capacity = self._slots_per_expert(axes, training)
        groups = axes[0] if self.capacity_group == "example" else 1
        if capacity is not None and self.router.serves_best_first:
            kept = kept_best_first(routing, num_experts, capacity, groups)
            routing = routing._replace(kept=kept)  # now all fit, in any order
        count, top_k = ops.shape(routing.experts)
        slots = None if capacity is None else num_experts * groups * capacity
        sizes = self._sizes(count, top_k, slots, bool(training), tokens)
        dispatcher = choose.choose(self.dispatcher, self.experts, sizes)
        placement = dispatcher.place(routing, num_experts, capacity, groups)
        # A function of numbers with gradients only, as all backends can recompute it.
        run = partial(dispatcher.run, placement=placement, experts=self.experts, training=training)
        return self._call_experts(run, tokens, routing.weights), placement.kept

    def _sizes(
        self, count: Size, top_k: int, slots: Size | None, training: bool, like: Tensor
    ) -> choose.Sizes:
        """What the choice of a dispatcher depends on, see `choose.Sizes`."""
        share = self.experts.num_experts / self.num_experts
        inputs, dtype = self.weigh == "inputs", self.compute_dtype
        return choose.Sizes(count, top_k, slots, dtype, training, like, inputs, share)

    def _slots_per_expert(self, axes: Axes, training: bool | None) -> Size | None:
        """C, or None where nothing is dropped."""
        count = math.prod(axes if self.capacity_group == "batch" else axes[1:])
        capacity = self._capacity
        if self.router.chooses_tokens and not self.has_capacity:
            capacity = dataclasses.replace(capacity, factor=1.0)
        return capacity.of(count, self.router.experts_per_token / self.num_experts, training)

    def _returned_routing(self, decision: Routing, routing: Routing, axes: Axes) -> Routing:
        """The record with the axes of the inputs, or of whole examples where these are routed."""
        if self.routing_level == "example":
            routing, axes = kept_examples(decision, routing.kept, axes), axes[:1]
        return with_axes(routing, axes)

    # === What is seen, and what may change ===

    @property
    def has_capacity(self) -> bool:
        """Whether there is a limit to what an expert takes, so that assignments can be dropped."""
        return self.capacity is not None or self.capacity_factor is not None

    @property
    def top_k(self) -> int:
        """Experts per token. Fewer than the layer was made with may be set, as for inference.

        A compiled function keeps what it was compiled with: compile the model again. A saved model
        has the number that the layer was made with.
        """
        return int(self.router.top_k)

    @top_k.setter
    def top_k(self, top_k: int) -> None:
        self.router.top_k = top_k

    def running_counts(self) -> dict[str, Any]:
        """Reads what was counted in training since the last reset.

        Returns:
            A dict of float64 arrays, padding excluded: `load (E,)`, the router's assignments per
            expert before drops; `assignments` and `dropped`, of the tokens; `decisions` of the
            router (tokens, or examples at that routing level); `entropy` and `confidence`, the sums
            over decisions of the router's entropy in nats and of its largest probability;
            `batches`, the calls with at least one token, and the sums over them of `batch_cv`, the
            standard deviation of their load over its mean, and `aux_loss`, what the layer adds to
            the model's loss; `worst_batch_cv` and `worst_dropped`, the largest spread of a batch
            and its largest share of dropped assignments. What is by batch is not saved.
        """
        check_built(self)
        return self._counts.read()

    def reset_worst_batch(self) -> None:
        """Starts the two numbers of the worst batch again, as `ExpertMonitor` does each epoch."""
        check_built(self)
        self._counts.by_batch.reset_worst()

    def reset_running_counts(self) -> None:
        """Starts the running counts again from 0."""
        check_built(self)
        self._counts.reset()

    def dispatch_plan(self, n_tokens: int, training: bool = True) -> DispatchPlan:
        """Says which dispatcher would take `n_tokens` tokens, at which cost, and why.

        Args:
            n_tokens: Positive integer, the tokens of one call.
            training: Whether gradients are taken. Defaults to `True`.
        """
        count = checks.positive_int("n_tokens", n_tokens)
        capacity = self._slots_per_expert((1, count), training)
        slots = None if capacity is None else self.num_experts * capacity
        top_k = self.router.experts_per_token
        sizes = self._sizes(count, top_k, slots, training, ops.zeros(()))
        return choose.plan(self.dispatcher, self.experts, sizes)

    # === Keras ===

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
        token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Routing]:
        if self.router.needs_token_ids:
            checks.token_ids("MoE", inputs, token_ids)
        outputs = self._output_spec(inputs, mask)
        if not return_routing:
            return outputs
        leading = tuple(inputs.shape)[: 1 if self.routing_level == "example" else -1]
        return outputs, self.router.routing_spec(leading)

    def get_config(self) -> Config:
        is_named = isinstance(self._router_argument, str)
        router = self._router_argument if is_named else config_of(self.router)
        is_named = isinstance(self._dispatch_argument, str)
        dispatch = self._dispatch_argument if is_named else config_of(self.dispatcher)
        return {
            **super().get_config(),
            **self._router_arguments,
            "router": router,
            "num_shared_experts": self.num_shared_experts,
            "weigh": self.weigh,
            "capacity": self.capacity,
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.eval_capacity_factor,
            "routing_level": self.routing_level,
            "capacity_group": self.capacity_group,
            "dispatch": dispatch,
        }
