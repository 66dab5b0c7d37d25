"""Keras 3 layers inside Keras 2 (`tf_keras`) models such as `tfrs.Model`."""

import inspect
import os
from typing import Any, Self

import keras

from keras_moe.core.optional import import_of_extra
from keras_moe.core.types import Config

if os.environ.get("TF_USE_LEGACY_KERAS") not in ("1", "true", "True"):
    raise ImportError(
        "keras_moe.integrations.tfrs needs Keras 2 as `tf.keras`: set the environment variable "
        "TF_USE_LEGACY_KERAS=1 before tensorflow is first imported, for instance with "
        '`os.environ["TF_USE_LEGACY_KERAS"] = "1"` as the first line of the program. '
        f"Received: TF_USE_LEGACY_KERAS={os.environ.get('TF_USE_LEGACY_KERAS')!r}"
    )
if keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_moe.integrations.tfrs needs Keras 3 to run on TensorFlow: set the environment "
        "variable KERAS_BACKEND=tensorflow before keras is first imported. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}"
    )
_USER = "`keras_moe.integrations.tfrs`"
tf: Any = import_of_extra("tfrs", _USER, "tensorflow")
tf_keras: Any = import_of_extra("tfrs", _USER, "tf_keras")
if tf.keras.layers.Layer is not tf_keras.layers.Layer:
    raise ImportError(
        "`tf.keras` was loaded as Keras 3 before TF_USE_LEGACY_KERAS=1 was set: set it before "
        f"tensorflow is first imported. Received: tf.keras.__version__={tf.keras.__version__}"
    )


@tf_keras.saving.register_keras_serializable(package="keras_moe")
class KerasBridge(tf_keras.layers.Layer):
    """Keras 2 layer that runs, trains and saves a Keras 3 layer or model.

    TensorFlow Recommenders needs Keras 2. The bridge lists the `tf.Variable`s of the Keras 3 layer
    as its own weights, so that Keras 2 optimizers, checkpoints and `summary()` see each once, and
    forwards the `training` flag, masks, losses and state updates. The Keras 3 layer keeps its own
    dtype policy: inputs reach it uncast, and outputs keep the dtype that it computes in.

    `trainable` of the bridge is `trainable` of the Keras 3 layer: setting either sets both.

    Args:
        layer: A `keras.Layer` or `keras.Model` of Keras 3. It is built by the first call, unless it
            is built already.
        name: String or None, the Keras 2 name. Defaults to None.
        **kwargs: Keyword arguments of the Keras 2 base layer, such as `trainable`.

    Call arguments:
        inputs: Tensor, or nested lists, tuples and dicts of tensors.
        *args: Further tensors for the Keras 3 layer.
        training: Boolean or None. None takes the mode of the enclosing Keras 2 call.
            Defaults to None.
        mask: Mask of the structure of `inputs`, or None. Defaults to None.
        **kwargs: Further keyword arguments for the Keras 3 layer.

    Returns:
        What the Keras 3 layer returns, with its output mask attached.

    Raises:
        TypeError: If `layer` is not a Keras 3 layer.

    Example:

    ```python
    import os

    os.environ["TF_USE_LEGACY_KERAS"] = "1"  # before tensorflow is first imported
    os.environ["KERAS_BACKEND"] = "tensorflow"

    import keras
    import tf_keras

    from keras_moe.integrations.tfrs import KerasBridge

    model = tf_keras.Sequential([KerasBridge(keras.layers.Dense(8)), tf_keras.layers.Dense(1)])
    model.compile("adam", "mse")
    ```
    """

    def __init__(self, layer: Any, name: str | None = None, **kwargs: Any) -> None:
        if not isinstance(layer, keras.Layer):
            hint = ", not of Keras 2" if isinstance(layer, tf_keras.layers.Layer) else ""
            raise TypeError(
                f"`layer` must be a layer or model of Keras 3 (`keras.Layer`){hint}. "
                f"Received: layer={layer!r} (of type {type(layer).__module__}."
                f"{type(layer).__name__})"
            )
        super().__init__(name=name, autocast=False, **kwargs)
        # Past the attribute tracking of Keras 2, which would list the Keras 3 variables themselves.
        object.__setattr__(self, "_keras_layer", layer)
        if not kwargs.get("trainable", True):
            layer.trainable = False
        # Keras 3 attaches masks to the outputs: Keras 2 must not compute them again.
        self._compute_output_and_mask_jointly = True
        self._tracked_count: int | None = None
        if all(sublayer.built for sublayer in layer._flatten_layers()):
            self._track_state()
            self.built = True

    @property
    def layer(self) -> Any:
        """The Keras 3 layer."""
        return self._keras_layer

    def call(
        self, inputs: Any, *args: Any, training: Any = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        return self._run(inputs, args, _static_training(training), mask, kwargs)

    # Keras 3 code is not written for autograph, which Keras 2 applies to `call`.
    @tf.autograph.experimental.do_not_convert
    def _run(self, inputs: Any, args: Any, training: bool | None, mask: Any, kwargs: Any) -> Any:
        if mask is not None:
            inputs = _attach_masks(inputs, mask)
            if "mask" in inspect.signature(self.layer.call).parameters:
                kwargs = {**kwargs, "mask": mask}
        if self._tracked_count is None:
            self._build_layer(inputs, args, kwargs)
        outputs = self.layer(inputs, *args, training=training, **kwargs)
        if len(self.layer.variables) != self._tracked_count:
            raise RuntimeError(
                f"Layer {self.layer.name!r} made variables after its first call, which checkpoints "
                "would miss: build all of it before wrapping it in KerasBridge. Received: "
                f"{len(self.layer.variables)} variables, {self._tracked_count} at the first call"
            )
        # Keras 3 lists weight regularizers last. They are a callable loss of the bridge instead: a
        # layer that is called twice in a step pays them once.
        losses = self.layer.losses
        call_losses = losses[: len(losses) - len(self._regularized_variables())]
        self.add_loss([tf.cast(loss, tf_keras.backend.floatx()) for loss in call_losses])
        return outputs

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, mask)

    def _build_layer(self, inputs: Any, args: Any, kwargs: Any) -> None:
        with tf.init_scope():
            if not all(sublayer.built for sublayer in self.layer._flatten_layers()):
                args, kwargs = tf.nest.map_structure(_to_keras_tensor, ((inputs, *args), kwargs))
                self.layer(*args, **kwargs)
            self._track_state()

    def _track_state(self) -> None:
        # Keras 3 names such as `dense_3` change from one build to the next, positions do not.
        for index, variable in enumerate(self.layer.variables):
            self._track_variable_as(f"variable_{index}", variable)
        for index, variable in enumerate(self.layer.metrics_variables):
            self._track_variable_as(f"metric_variable_{index}", variable)
        self._tracked_count = len(self.layer.variables)
        if any(variable.regularizer is not None for variable in self.layer.weights):
            self.add_loss(self._regularization_loss)

    def _track_variable_as(self, name: str, variable: Any) -> None:
        self._maybe_initialize_trackable()
        loaded = self._lookup_dependency(name)
        if loaded is not None:  # `load_model` of a SavedModel makes the variables before the layer.
            variable.assign(loaded)
        self._track_trackable(variable.value, name=name, overwrite=True)
        # Keras 3 gives every kernel of a layer one TF name; the HDF5 format needs them unique.
        variable.value._handle_name = f"{name}/{variable.name}:0"
        variable.value._constraint = variable.constraint  # which Keras 2 optimizers apply

    def _regularized_variables(self) -> list[Any]:
        return [v for v in self.layer.trainable_weights if v.regularizer is not None]

    def _regularization_loss(self) -> Any:
        losses = [variable.regularizer(variable) for variable in self._regularized_variables()]
        return tf.add_n([tf.cast(x, tf_keras.backend.floatx()) for x in losses]) if losses else None

    @property
    def _trainable(self) -> bool:
        """Where Keras 2 keeps `trainable`, and where a parent sets it."""
        return bool(self.layer.trainable) if hasattr(self, "_keras_layer") else True

    @_trainable.setter
    def _trainable(self, value: bool) -> None:
        if hasattr(self, "_keras_layer"):
            self.layer.trainable = value

    @property
    def trainable_weights(self) -> list[Any]:
        """The `tf.Variable`s that optimizers update."""
        return [variable.value for variable in self.layer.trainable_weights]

    @property
    def non_trainable_weights(self) -> list[Any]:
        """The `tf.Variable`s that they do not. Seed states are saved, but not listed."""
        return [variable.value for variable in self.layer.non_trainable_weights]

    def save_own_variables(self, store: Any) -> None:
        for index, variable in enumerate(self.layer.variables):
            store[str(index)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        variables = self.layer.variables
        if len(store.keys()) != len(variables):
            raise ValueError(
                f"KerasBridge {self.name!r} must hold the layer that was saved, and be called once "
                f"before its weights are loaded. Received: {len(store.keys())} saved variables for "
                f"{len(variables)} variables of layer {self.layer.name!r}"
            )
        for index, variable in enumerate(variables):
            variable.assign(store[str(index)])

    def get_config(self) -> Config:
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config: Config) -> Self:
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def _static_training(training: Any) -> bool | None:
    if training is None:
        return None
    value = tf.get_static_value(training) if tf.is_tensor(training) else training
    if value is None:
        raise ValueError(
            "`training` must be known when the graph is traced: Keras 3 layers take a Python "
            f"boolean. Received: training={training}"
        )
    return bool(value)


def _attach_masks(inputs: Any, mask: Any) -> Any:
    tensors, masks = tf.nest.flatten(inputs), tf.nest.flatten(mask)
    if len(tensors) != len(masks):
        raise ValueError(
            "`mask` must have the structure of `inputs`, with None where there is no mask. "
            f"Received: {len(masks)} masks for {len(tensors)} inputs"
        )
    return tf.nest.pack_sequence_as(inputs, list(map(_with_mask, tensors, masks)))


def _with_mask(tensor: Any, mask: Any) -> Any:
    if mask is None or getattr(tensor, "_keras_mask", None) is mask:
        return tensor
    tensor = tf.identity(tensor)  # the caller's tensor keeps its own mask
    tensor._keras_mask = mask
    return tensor


def _to_keras_tensor(x: Any) -> Any:
    if not tf.is_tensor(x):
        return x
    return keras.KerasTensor(
        tuple(x.shape),
        dtype=x.dtype.name,
        sparse=isinstance(x, tf.SparseTensor),
        ragged=isinstance(x, tf.RaggedTensor),
    )
