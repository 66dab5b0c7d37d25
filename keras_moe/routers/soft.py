"""The router of Soft MoE: no choice, but two softmaxes of one score."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.initializers import FiniteInitializer
from keras_moe.core.loading import NamesSizes
from keras_moe.core.numerics import as_float, softmax
from keras_moe.core.records import SoftRouting
from keras_moe.core.types import Config, InitializerLike, RegularizerLike, Shape, Size, Tensor
from keras_moe.dispatch import backend
from keras_moe.routers.loss_weights import refuse_loss_weights

_EPSILON = 1e-6  # vmoe's; the paper's x / (norm + eps) has a NaN gradient at a zero vector
# How tokens are dispatched to slots, and how slots are combined into tokens.
_MIXINGS = {
    "soft": ("soft", "soft"),
    "soft_uniform": ("soft", "uniform"),
    "uniform_soft": ("uniform", "soft"),
    "uniform": ("uniform", "uniform"),
    "identity": ("identity", "identity"),
}


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftRouter(NamesSizes):
    """Scores every token against every slot, normalised, in float32.

    logits[b,n,e,p] = scale * l2norm(x[b,n,:]) . l2norm(phi[:,e,p])
    dispatch = softmax over n; combine = softmax over (e, p)
    with l2norm(v) = v * rsqrt(sum(v^2) + 1e-6). Padding gets no dispatch weight; in a fully padded
    sequence all dispatch weights are 0.

    Args:
        num_experts: Positive integer, the number of experts E.
        slots_per_expert: Positive integer, the slots P of each expert. Defaults to `1`.
        mixing: `"soft"`, or one of the paper's ablations: `"soft_uniform"` has a uniform combine
            (1 / (E P)), `"uniform_soft"` a uniform dispatch (1 / tokens, of a sequence's real
            ones), `"uniform"` both, and with `"identity"` token i is slot i. Where nothing is
            scored (`"uniform"`, `"identity"`) there are no weights. Defaults to `"soft"`.
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

    Raises:
        ValueError: on sizes that are not positive, an unknown `mixing`, one of `"identity"` that is
            causal, or where its tokens are not as many as the slots.

    Reference:
        Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", algorithms 1 and 2, and
        table 2 and appendix A for `mixing`.
    """

    AXES = (("phi", "input width", "num_experts", "slots_per_expert"),)

    def __init__(
        self,
        num_experts: int,
        slots_per_expert: int = 1,
        *,
        mixing: str = "soft",
        causal: bool = False,
        phi_initializer: InitializerLike = "lecun_normal",
        scale_initializer: InitializerLike = "ones",
        phi_regularizer: RegularizerLike = None,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs)
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self.slots_per_expert = checks.positive_int("slots_per_expert", slots_per_expert)
        self.mixing = checks.one_of("mixing", mixing, _MIXINGS)
        self.causal = bool(causal)
        if self.causal and self.mixing == "identity":
            checks.fail(
                "`causal` must be False where `mixing` is 'identity': no token sees another.",
                causal=causal,
            )
        self.phi_initializer = keras.initializers.get(phi_initializer)
        self.scale_initializer = keras.initializers.get(scale_initializer)
        self.phi_regularizer = keras.regularizers.get(phi_regularizer)
        self.phi: Any = None
        self.scale: Any = None
        self.supports_masking = True

    @property
    def num_slots(self) -> int:
        """The slots of all experts, E P."""
        return self.num_experts * self.slots_per_expert

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("SoftRouter", tuple(input_shape), min_rank=3)
        if "soft" not in _MIXINGS[self.mixing]:
            return  # weights that nothing reads would get no gradient

        def as_matrix(shape: Any, dtype: Any = None) -> Tensor:
            # Drawn as (d, E P), since Keras counts middle axes in the fan.
            initializer = FiniteInitializer(self.phi_initializer, "router/phi")
            return ops.reshape(initializer((width, self.num_slots), dtype=dtype), shape)

        self.phi = self.add_weight(
            name="phi",
            shape=(width, self.num_experts, self.slots_per_expert),
            initializer=as_matrix,
            regularizer=self.phi_regularizer,
        )
        self.scale = self.add_weight(
            name="scale",
            shape=(),
            initializer=FiniteInitializer(self.scale_initializer, "router/scale"),
        )

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> SoftRouting:
        inputs = as_float(inputs, self.compute_dtype)
        batch, count, _ = ops.shape(inputs)
        self.check_count(count)
        with backend.current.without_autocast():
            logits = self._logits(inputs)
            dispatch, combine = self._weights(logits, self.visible(count, mask))
        prefixes = (count,) if self.causal else ()
        slots = (self.num_experts, self.slots_per_expert)
        return SoftRouting(
            dispatch=ops.reshape(dispatch, (batch, *prefixes, count, *slots)),
            combine=ops.reshape(combine, (batch, count, *slots)),
            logits=ops.reshape(logits, (batch, count, *slots)),
        )

    def _logits(self, inputs: Tensor) -> Tensor:
        """Scores `(b, n, s)`; zeros where nothing is scored."""
        if self.phi is None:
            return ops.zeros((*ops.shape(inputs)[:-1], self.num_slots), dtype="float32")
        phi = ops.reshape(self.phi, (-1, self.num_slots))
        phi = self.scale * _l2_normalize(phi, axis=0)
        return ops.matmul(_l2_normalize(inputs, axis=-1), phi)

    def _weights(self, logits: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """Dispatch, `(b, n, s)` or `(b, prefix, n, s)`, and combine, `(b, n, s)`."""
        if self.mixing == "identity":
            one_to_one = logits + ops.eye(self.num_slots, dtype="float32")  # of scores that are 0
            return _hide(one_to_one, visible), one_to_one
        dispatch, combine = (  # a softmax of equal scores is uniform
            logits if kind == "soft" else ops.zeros_like(logits) for kind in _MIXINGS[self.mixing]
        )
        if self.causal:
            dispatch = ops.expand_dims(dispatch, 1)
        if visible is not None:
            unseen = ops.full_like(dispatch, -1e30)
            dispatch = ops.where(ops.expand_dims(visible, -1), dispatch, unseen)
        # Where nothing is visible the softmax is uniform, and set to zero here.
        return _hide(softmax(dispatch, axis=-2), visible), softmax(combine, axis=-1)

    def visible(self, count: Size, mask: Tensor | None) -> Tensor | None:
        """Tokens that a slot mixes, bool `(batch, n)`; with `causal` `(batch, n, n)`, entry
        [b, n, m] for token m in the slots that token n reads. None for all of them.
        """
        if not self.causal:
            return mask
        position = ops.arange(count, dtype="int32")
        is_past = (position <= ops.expand_dims(position, -1))[None]
        return is_past if mask is None else ops.logical_and(is_past, mask[:, None])

    def check_count(self, count: Any) -> None:
        """Fails where `mixing` is "identity" and a known number of tokens is not that of slots."""
        is_wrong = isinstance(count, int) and count != self.num_slots
        if self.mixing == "identity" and is_wrong:
            checks.fail(
                "`mixing='identity'` takes as many tokens as there are slots, "
                f"num_experts * slots_per_expert = {self.num_slots}.",
                tokens=count,
            )

    def compute_output_spec(self, inputs: Tensor, mask: Tensor | None = None) -> SoftRouting:
        return self.routing_spec(tuple(inputs.shape)[:-1])

    def routing_spec(self, leading: tuple[int | None, ...]) -> SoftRouting:
        """The `SoftRouting` of symbolic tensors whose batch and token axes are `leading`."""
        batch, count = leading
        self.check_count(count)
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
            "mixing": self.mixing,
            "causal": self.causal,
            "phi_initializer": keras.initializers.serialize(self.phi_initializer),
            "scale_initializer": keras.initializers.serialize(self.scale_initializer),
            "phi_regularizer": keras.regularizers.serialize(self.phi_regularizer),
        }


def _hide(weights: Tensor, visible: Tensor | None) -> Tensor:
    """Zeros the weights of tokens that are not visible."""
    if visible is None:
        return weights
    return ops.where(ops.expand_dims(visible, -1), weights, ops.zeros_like(weights))


def _l2_normalize(values: Tensor, axis: int) -> Tensor:
    return values * ops.rsqrt(ops.sum(ops.square(values), axis=axis, keepdims=True) + _EPSILON)
