"""Base of `MoE` and `SoftMoE`: a bank of feed-forward experts and its arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.core.initializers import derived_seed, reseeded
from keras_moe.core.loading import NamesSizes
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
from keras_moe.layers.expert_mlp import ExpertMLP
from keras_moe.layers.freezing import FreezesParts
from keras_moe.layers.layer_experts import LayerExperts
from keras_moe.layers.rematerialization import RematerializesExperts
from keras_moe.layers.sublayers import adopt, build_once, config_of
from keras_moe.routers import Router
from keras_moe.routers.loss_weights import refuse_loss_weights

NAMED_EXPERTS = {"mlp": False, "glu": True}  # name -> gated


class ExpertFeedForward(FreezesParts, RematerializesExperts, NamesSizes):
    """Base of layers whose experts are feed-forward networks `(..., d) -> (..., output_dim)`.

    Args:
        num_experts: Positive integer, the number of experts E.
        hidden_dim: The hidden width of named experts, or None where experts are Keras layers.
        experts: `"mlp"`, `"glu"`, a bank such as `ExpertMLP`, a Keras layer that is copied E times,
            the config of one of these, or a list of E Keras layers.
        output_dim: The output width of named experts; None for the inputs'.
        activation: Activation of the hidden layer.
        use_bias: Whether experts have biases.
        dropout: Float in [0, 1), dropout after the hidden layer.
        kernel_initializer: Initializer of one expert's kernels.
        bias_initializer: Initializer of one expert's biases.
        kernel_regularizer: Optional regularizer of kernels.
        bias_regularizer: Optional regularizer of biases.
        kernel_constraint: Optional constraint of kernels.
        bias_constraint: Optional constraint of biases.
        seed: Optional integer, seed of dropout.
        describes_others: Whether the layer makes other experts, which these arguments describe too.
    """

    _rule: type[Router] | None = None  # a router that brings losses

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int | None,
        *,
        experts: ExpertsLike,
        output_dim: int | None,
        activation: Activation,
        use_bias: bool,
        dropout: float,
        kernel_initializer: InitializerLike,
        bias_initializer: InitializerLike,
        kernel_regularizer: RegularizerLike,
        bias_regularizer: RegularizerLike,
        kernel_constraint: ConstraintLike,
        bias_constraint: ConstraintLike,
        seed: int | None,
        describes_others: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs, self._rule)
        super().__init__(**kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self.hidden_dim = checks.optional(checks.positive_int, "hidden_dim", hidden_dim)
        self.output_dim = checks.optional(checks.positive_int, "output_dim", output_dim)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.dropout = checks.rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.seed = checks.optional(checks.integer, "seed", seed)
        self.supports_masking = True

        self._experts_name = experts if isinstance(experts, str) else None
        self.experts: Any = self._experts_from(experts)
        if self.experts is None and self.hidden_dim is None:
            checks.fail(
                "`hidden_dim` must be a positive integer where the layer builds the experts.",
                hidden_dim=None,
            )
        if self.experts is not None and self.output_dim is not None:
            checks.fail(
                "`output_dim` must be None where `experts` are layers, which set it themselves.",
                output_dim=self.output_dim,
            )
        if self.experts is not None and not describes_others:
            self._refuse_descriptions()

    def _refuse_descriptions(self) -> None:
        """Fails where an argument describes experts that the layer does not make."""
        given = {name: getattr(self, name) for name in ("hidden_dim", *_DESCRIPTIONS)}
        refuse_descriptions(type(self), given)

    def _experts_from(self, experts: Any) -> Any:
        """The bank where experts are objects; named ones are made by `_make_experts`, None here."""
        if isinstance(experts, str):
            checks.one_of("experts", experts, NAMED_EXPERTS)
            return None
        return bank_from(experts, self.num_experts, self.dtype_policy)

    def _make_experts(self) -> None:
        """Makes the bank of named experts or adopts a bank, once nothing is refused any more."""
        if self._experts_name is None:
            adopt(self.experts, "experts")
        else:
            self.experts = self._mlp(self.num_experts, "experts")

    def _build_experts(self, width: int) -> None:
        build_once(self.experts, (self.num_experts, None, width))

    def _mlp(self, num_experts: int, name: str) -> ExpertMLP:
        return ExpertMLP(
            num_experts,
            (checks.positive_int("hidden_dim", self.hidden_dim), self.output_dim),
            self.activation,
            gated=NAMED_EXPERTS.get(self._experts_name or "mlp", False),
            dropout=self.dropout,
            use_bias=self.use_bias,
            kernel_initializer=reseeded(self.kernel_initializer, name),
            bias_initializer=reseeded(self.bias_initializer, name),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.kernel_constraint,
            bias_constraint=self.bias_constraint,
            seed=derived_seed(self.seed, name),
            name=name,
            dtype=self.dtype_policy,
        )

    def _output_width(self, width: int) -> int:
        if self._experts_name is not None:
            return self.output_dim or width
        output_shape: tuple[Any, ...] = self.experts.compute_output_shape((1, None, width))
        return int(output_shape[-1])

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        width = checks.token_shape(type(self).__name__, tuple(input_shape))
        return (*tuple(input_shape)[:-1], self._output_width(width))

    def _output_spec(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            checks.mask_shape(type(self).__name__, inputs, mask)
        shape = self.compute_output_shape(tuple(inputs.shape))
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self) -> Config:
        config: Config = super().get_config()
        experts = self._experts_name or config_of(self.experts)
        return {
            **config,
            "num_experts": self.num_experts,
            "hidden_dim": self.hidden_dim,
            "experts": experts,
            "output_dim": self.output_dim,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "seed": self.seed,
        }


def bank_from(experts: Any, num_experts: int, dtype: Any) -> Any:
    """The bank of experts that are objects: a bank, a Keras layer, a list of these, or a config."""
    if isinstance(experts, dict):
        experts = keras.saving.deserialize_keras_object(experts)
    is_mixture = isinstance(experts, ExpertFeedForward)  # one expert, of experts of its own
    is_layer = isinstance(experts, keras.layers.Layer)
    if is_layer and hasattr(experts, "num_experts") and not is_mixture:
        if experts.num_experts != num_experts:
            checks.fail(
                f"A bank of `experts` must have num_experts={num_experts}.",
                **{"experts.num_experts": experts.num_experts},
            )
        return experts
    if not isinstance(experts, keras.layers.Layer | Sequence):
        checks.fail(
            f"`experts` must be one of {sorted(NAMED_EXPERTS)}, a bank such as `ExpertMLP`, a "
            "Keras layer or a list of Keras layers.",
            experts=experts,
        )
    return LayerExperts(experts, num_experts, name="experts", dtype=dtype)


def refuse_descriptions(layer: type, given: Mapping[str, Any]) -> None:
    """Fails where an argument of a layer, not its default, describes experts that it is given."""
    for name, value in given.items():
        made = _DESCRIPTIONS.get(name, _same)
        if _comparable(made(value)) != _comparable(made(_default_of(layer, name))):
            checks.fail(
                f"`{name}` must be left out where `experts` are layers: give it to these.",
                **{name: value},
            )


def _same(value: Any) -> Any:
    return value


# Arguments that describe the experts that a layer makes, and what they are made of.
_DESCRIPTIONS: dict[str, Callable[[Any], Any]] = {
    "activation": keras.activations.get,
    "use_bias": _same,
    "dropout": _same,
    "kernel_initializer": keras.initializers.get,
    "bias_initializer": keras.initializers.get,
    "kernel_regularizer": keras.regularizers.get,
    "bias_regularizer": keras.regularizers.get,
    "kernel_constraint": keras.constraints.get,
    "bias_constraint": keras.constraints.get,
}


def _default_of(layer: type, argument: str) -> Any:
    """The default of a constructor's argument, which a subclass may hand on in `**kwargs`."""
    for base in layer.__mro__:
        parameter = inspect.signature(base).parameters.get(argument)
        if parameter is not None and parameter.default is not inspect.Parameter.empty:
            return parameter.default
    return None


def _comparable(value: Any) -> Any:
    """An object of Keras as what makes it, to be compared with another."""
    return (type(value), value.get_config()) if hasattr(value, "get_config") else value
