"""Soft mixture of experts: slots that mix all tokens of a sequence."""

import math
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.numerics import as_float
from keras_moe.core.records import SoftRouting
from keras_moe.core.types import (
    Activation,
    Config,
    ConstraintLike,
    ExpertsLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    Tensor,
)
from keras_moe.layers.counts import SoftCounts, check_built
from keras_moe.layers.feed_forward import ExpertFeedForward
from keras_moe.layers.freezing import freeze_parts
from keras_moe.layers.sublayers import name_or_default
from keras_moe.layers.tokens import flat_mask, zero_where_padded
from keras_moe.routers.soft import SoftRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftMoE(ExpertFeedForward):
    """Mixes the tokens of each sequence into E * P slots, and the slots' outputs into the tokens.

    logits[b,n,e,p] = scale * l2norm(x[b,n,:]) . l2norm(phi[:,e,p])
    slots[b,e,p,:]  = sum_n softmax_n(logits)[b,n,e,p] x[b,n,:]      (raw tokens)
    y[b,n,:]        = sum_ep softmax_ep(logits)[b,n,e,p] expert_e(slots[b,e,p,:])

    Nothing is dropped, no loss is needed, and no example sees another. Every token sees the whole
    sequence, unless `causal`: the layer belongs in encoders. A token that is not finite spoils its
    sequence.

    Args:
        num_experts: Positive integer, the number of experts E.
        hidden_dim: Positive integer, the hidden width h of each expert. Only `None` where `experts`
            are Keras layers. Defaults to `None`.
        slots_per_expert: Positive integer, the slots P of each expert. Defaults to `1` (the
            paper's).
        mixing: `"soft"`, or an ablation of the paper, to tell what soft mixing is worth:
            `"soft_uniform"` averages the slots' outputs in place of the combine softmax,
            `"uniform_soft"` fills every slot with the mean of the real tokens, `"uniform"` does
            both, and with `"identity"` token i is slot i, so that tokens must be as many as slots
            (padding included). `"uniform"` and `"identity"` have no `router/phi` and
            `router/scale`. Defaults to `"soft"`.
        causal: Whether token n's output depends on tokens 0 to n alone: it is what the layer would
            give token n of the sequence cut off after it. Exact, and n times the expert work: each
            token has its own slots. Not with `"identity"`, where no token sees another. Defaults to
            `False`.
        experts: `"mlp"`, `"glu"` (gated hidden layer), a bank such as `ExpertMLP`, a Keras layer
            of which E copies with new random weights are made (`LayerExperts(copy_weights=True)`
            keeps trained ones), the config of one of these, or a list of E Keras layers; what the
            layer does not build itself takes none of the arguments below that describe experts.
            Defaults to `"mlp"`.
        output_dim: Positive integer, the output width; None for the inputs' width d. Defaults to
            `None`.
        activation: Activation of the experts' hidden layer. Defaults to `"gelu"`.
        use_bias: Whether experts have biases. Defaults to `True`.
        dropout: Float in [0, 1), dropout after the experts' hidden layer. Defaults to `0.0`.
        phi_initializer: Initializer of `phi`. Defaults to `"lecun_normal"`.
        scale_initializer: Initializer of the scalar `scale`. Defaults to `"ones"`.
        kernel_initializer: Initializer of one expert's kernels. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of one expert's biases. Defaults to `"zeros"`.
        phi_regularizer: Optional regularizer of `phi`. Defaults to `None`.
        kernel_regularizer: Optional regularizer, called with the experts' stacked kernels.
            Defaults to `None`.
        bias_regularizer: Optional regularizer, called with the experts' stacked biases. Defaults to
            `None`.
        kernel_constraint: Optional constraint of one expert's kernels. Defaults to `None`.
        bias_constraint: Optional constraint of one expert's biases. Defaults to `None`.
        seed: Optional integer, seed of dropout. Defaults to `None`.

    Call arguments:
        inputs: `(batch, ..., d)`; all axes between the first and the last are one sequence. With
            inputs `(batch, d)` each example is a sequence of one token.
        mask: Optional bool `(batch, ...)`, False at padding, which enters no slot and gets 0.
        training: Whether dropout and counting are on.
        return_routing: Whether to return the `keras_moe.SoftRouting` too. Defaults to `False`.

    Input shape:
        `(batch, ..., d)`

    Output shape:
        `(batch, ..., output_dim)`

    Returns:
        The outputs, or the outputs and the `SoftRouting`, `(batch, tokens, E, P)`, with
        `return_routing=True` (see there for `causal`).

    Raises:
        ValueError: on sizes that are not positive, an unknown `mixing`, inputs of rank 1, a mask
            that has not one entry per token, or tokens that `"identity"` does not take.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.SoftMoE(num_experts=16, hidden_dim=64)
    >>> tuple(layer(np.zeros((4, 10, 16), "float32")).shape)
    (4, 10, 16)

    Reference:
        Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", algorithms 1 and 2, and
        table 2 and appendix A for `mixing`.
    """

    parts = ("router", "experts")
    AXES = (("importance", "limbs", "num_experts", "slots_per_expert"),)

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        slots_per_expert: int = 1,
        mixing: str = "soft",
        causal: bool = False,
        experts: ExpertsLike = "mlp",
        output_dim: int | None = None,
        activation: Activation = "gelu",
        use_bias: bool = True,
        dropout: float = 0.0,
        phi_initializer: InitializerLike = "lecun_normal",
        scale_initializer: InitializerLike = "ones",
        kernel_initializer: InitializerLike = "glorot_uniform",
        bias_initializer: InitializerLike = "zeros",
        phi_regularizer: RegularizerLike = None,
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
            name=name_or_default(name, "soft_moe"),
            **kwargs,
        )
        self.slots_per_expert = checks.positive_int("slots_per_expert", slots_per_expert)
        self.causal = bool(causal)
        self.router = SoftRouter(
            self.num_experts,
            self.slots_per_expert,
            mixing=mixing,
            causal=self.causal,
            phi_initializer=phi_initializer,
            scale_initializer=scale_initializer,
            phi_regularizer=phi_regularizer,
            name="router",
        )
        self.mixing = self.router.mixing
        self._make_experts()
        freeze_parts(self)

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("SoftMoE", tuple(input_shape))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})
        self.router.build((None, None, width))
        self._build_experts(width)
        self._counts = SoftCounts(self, self.num_experts, self.slots_per_expert)

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, SoftRouting]:
        inputs = as_float(inputs, self.compute_dtype)
        token_axes, width = ops.shape(inputs)[:-1], inputs.shape[-1]
        batch, count = token_axes[0], math.prod(token_axes[1:])
        tokens = ops.reshape(inputs, (batch, count, width))
        token_mask = flat_mask("SoftMoE", inputs, mask, (batch, count))
        tokens = zero_where_padded(tokens, token_mask)

        routing = self.router(tokens, mask=token_mask)
        num_slots = self.num_experts * self.slots_per_expert
        # Sets of slots per sequence, and the tokens that read one set.
        sets, readers = (count, 1) if self.causal else (1, count)
        dispatch = ops.cast(routing.dispatch, self.compute_dtype)
        dispatch = ops.reshape(dispatch, (batch, sets, count, num_slots))
        mixed = ops.matmul(ops.transpose(dispatch, (0, 1, 3, 2)), ops.expand_dims(tokens, 1))
        outputs = self._apply_experts(mixed, training)  # (b, sets, e p, out)
        combine = ops.cast(routing.combine, self.compute_dtype)
        combine = ops.reshape(combine, (batch, sets, readers, num_slots))
        outputs = ops.reshape(ops.matmul(combine, outputs), (batch, count, outputs.shape[-1]))
        outputs = ops.cast(zero_where_padded(outputs, token_mask), self.compute_dtype)
        if self._is_counted(training):
            self._counts.add(routing, token_mask, self.router.visible(count, token_mask))
        if self.recorder is not None:
            self.recorder(routing)
        outputs = ops.reshape(outputs, (*token_axes, outputs.shape[-1]))
        return (outputs, routing) if return_routing else outputs

    def _apply_experts(self, slots: Tensor, training: bool | None) -> Tensor:
        """Runs each expert on its slots, `(b, sets, e p, d) -> (b, sets, e p, out)`."""
        batch, sets, num_slots, width = ops.shape(slots)
        experts, per_expert = self.num_experts, self.slots_per_expert
        rows = ops.reshape(slots, (batch * sets, experts, per_expert, width))
        rows = ops.transpose(rows, (1, 0, 2, 3))
        rows = ops.reshape(rows, (experts, batch * sets * per_expert, slots.shape[-1]))
        outputs = self._call_experts(partial(self.experts, training=training), rows)
        output_dim = outputs.shape[-1]
        outputs = ops.reshape(outputs, (experts, batch * sets, per_expert, output_dim))
        outputs = ops.transpose(outputs, (1, 0, 2, 3))
        return ops.reshape(outputs, (batch, sets, num_slots, output_dim))

    def running_counts(self) -> dict[str, Any]:
        """Reads what was counted in training since the last reset.

        Returns:
            A dict of float64 arrays, padding excluded: `importance (E,)` and `slot_importance (E,
            P)`, the tokens' combine weight per expert and per slot; `decisions`, the tokens;
            `entropy`, the sum over them of the entropy of their combine weights per expert, in
            nats; `sequences`; `dispatch_min` and `dispatch_max`, the sums over them of the least
            and the most dispatched token's weight in all slots, over the mean token's. In a causal
            layer every real token ends a sequence of its own.
        """
        check_built(self)
        return self._counts.read()

    def reset_running_counts(self) -> None:
        """Starts the running counts again from 0."""
        check_built(self)
        self._counts.reset()

    def slot_cosines(self) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Measures how alike the slots are.

        Returns:
            A float64 array `(E P, E P)`, the absolute cosines of the slots' vectors `phi`; None
            where nothing is scored, so that there are none.
        """
        check_built(self)
        if self.router.phi is None:
            return None
        phi = np.asarray(ops.convert_to_numpy(self.router.phi.value), dtype=np.float64)
        phi = phi.reshape(phi.shape[0], -1)
        phi = phi / np.maximum(np.linalg.norm(phi, axis=0), 1e-12)
        return np.abs(phi.T @ phi)

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, SoftRouting]:
        outputs = self._output_spec(inputs, mask)
        batch, *axes, _ = tuple(inputs.shape)
        routing = self.router.routing_spec((batch, None if None in axes else math.prod(axes)))
        return (outputs, routing) if return_routing else outputs

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "slots_per_expert": self.slots_per_expert,
            "mixing": self.mixing,
            "causal": self.causal,
            "phi_initializer": keras.initializers.serialize(self.router.phi_initializer),
            "scale_initializer": keras.initializers.serialize(self.router.scale_initializer),
            "phi_regularizer": keras.regularizers.serialize(self.router.phi_regularizer),
        }
