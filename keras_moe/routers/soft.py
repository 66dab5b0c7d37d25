"""The router of Soft MoE: no choice, but two softmaxes of one score."""

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._numerics import softmax
from keras_moe.initializers import FiniteInitializer
from keras_moe.routing import SoftRouting
from keras_moe.types import Config, InitializerLike, RegularizerLike, Tensor

_EPSILON = 1e-6  # vmoe's; the paper's x / (norm + eps) has a NaN gradient at a zero vector


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftRouter(keras.layers.Layer):
    """Scores every token against every slot, normalised, in float32.

    logits[b,n,e,p] = scale * l2norm(x[b,n,:]) . l2norm(phi[:,e,p])
    dispatch = softmax over n; combine = softmax over (e, p)
    with l2norm(v) = v * rsqrt(sum(v^2) + 1e-6). Padding gets no dispatch weight; in a fully padded
    sequence all dispatch weights are 0.

    Args:
        num_experts: Positive integer, the number of experts E.
        slots_per_expert: Positive integer, the slots P of each expert. Defaults to `1`.
        causal: Whether the slots that a token reads mix only the tokens up to it: one set of slots
            per token. Defaults to `False`.
        phi_initializer: Initializer of `phi`. Its size cancels in the norm; defaults to
            `"lecun_normal"` over d, as in vmoe.
        scale_initializer: Initializer of the scalar `scale`. Defaults to `"ones"`.
        phi_regularizer: Optional regularizer of `phi`. Defaults to `None`.

    Call arguments:
        inputs: `(batch, n, d)` tokens.
        mask: bool `(batch, n)`, False at padding, or None.

    Returns:
        A `keras_moe.SoftRouting` of shape `(batch, n, E, P)`; with `causal`, its `dispatch` is
        `(batch, n, n, E, P)`.

    Reference:
        Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", algorithms 1 and 2.
    """

    def __init__(
        self,
        num_experts: int,
        slots_per_expert: int = 1,
        *,
        causal: bool = False,
        phi_initializer: InitializerLike = "lecun_normal",
        scale_initializer: InitializerLike = "ones",
        phi_regularizer: RegularizerLike = None,
        **kwargs: Any,
    ) -> None:
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.num_experts = _checks.positive_int("num_experts", num_experts)
        self.slots_per_expert = _checks.positive_int("slots_per_expert", slots_per_expert)
        self.causal = bool(causal)
        self.phi_initializer = keras.initializers.get(phi_initializer)
        self.scale_initializer = keras.initializers.get(scale_initializer)
        self.phi_regularizer = keras.regularizers.get(phi_regularizer)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        width = _checks.token_shape("SoftRouter", tuple(input_shape), min_rank=3)
        slots = (self.num_experts, self.slots_per_expert)

        def as_matrix(shape: Any, dtype: Any = None) -> Tensor:
            # Drawn as (d, E P), since Keras counts middle axes in the fan.
            initializer = FiniteInitializer(self.phi_initializer, "router/phi")
            return ops.reshape(initializer((width, slots[0] * slots[1]), dtype=dtype), shape)

        self.phi = self.add_weight(
            name="phi",
            shape=(width, *slots),
            initializer=as_matrix,
            regularizer=self.phi_regularizer,
        )
        self.scale = self.add_weight(
            name="scale",
            shape=(),
            initializer=FiniteInitializer(self.scale_initializer, "router/scale"),
        )

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> SoftRouting:
        batch, count, _ = ops.shape(inputs)
        num_slots = self.num_experts * self.slots_per_expert
        phi = ops.reshape(self.phi, (-1, num_slots))
        phi = self.scale * _l2_normalize(phi, axis=0)
        logits = ops.matmul(_l2_normalize(inputs, axis=-1), phi)  # (b, n, e p)
        prefixes = (count,) if self.causal else ()
        slots = (self.num_experts, self.slots_per_expert)
        return SoftRouting(
            dispatch=ops.reshape(self._dispatch(logits, mask), (batch, *prefixes, count, *slots)),
            combine=ops.reshape(softmax(logits, axis=-1), (batch, count, *slots)),
            logits=ops.reshape(logits, (batch, count, *slots)),
        )

    def _dispatch(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over the tokens that a slot may see, `(b, n, s)`, or `(b, prefix, n, s)`."""
        visible = None if mask is None else ops.expand_dims(mask, -1)  # (b, n, 1)
        if self.causal:
            position = ops.arange(ops.shape(logits)[1], dtype="int32")
            is_past = (position <= ops.expand_dims(position, -1))[None, :, :, None]
            visible = is_past if visible is None else ops.logical_and(is_past, visible[:, None])
            logits = ops.expand_dims(logits, 1)
        if visible is None:
            return softmax(logits, axis=-2)
        seen = softmax(ops.where(visible, logits, ops.full_like(logits, -1e30)), axis=-2)
        # Where nothing is visible the softmax is uniform, and set to zero here.
        return ops.where(visible, seen, ops.zeros_like(seen))

    def compute_output_spec(self, inputs: Tensor, mask: Tensor | None = None) -> SoftRouting:
        return self.routing_spec(tuple(inputs.shape)[:-1])

    def routing_spec(self, leading: tuple[int | None, ...]) -> SoftRouting:
        """The `SoftRouting` of symbolic tensors whose batch and token axes are `leading`."""
        batch, count = leading
        slots = (self.num_experts, self.slots_per_expert)
        prefixes = (count,) if self.causal else ()

        def spec(*shape: int | None) -> Tensor:
            return keras.KerasTensor(shape, dtype="float32")

        return SoftRouting(
            dispatch=spec(batch, *prefixes, count, *slots),
            combine=spec(batch, count, *slots),
            logits=spec(batch, count, *slots),
        )

    def get_config(self) -> Config:
        config: Config = super().get_config()
        return {
            **config,
            "num_experts": self.num_experts,
            "slots_per_expert": self.slots_per_expert,
            "causal": self.causal,
            "phi_initializer": keras.initializers.serialize(self.phi_initializer),
            "scale_initializer": keras.initializers.serialize(self.scale_initializer),
            "phi_regularizer": keras.regularizers.serialize(self.phi_regularizer),
        }


def _l2_normalize(values: Tensor, axis: int) -> Tensor:
    return values * ops.rsqrt(ops.sum(ops.square(values), axis=axis, keepdims=True) + _EPSILON)
