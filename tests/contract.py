"""The contract that every layer of keras_moe keeps, on every backend.

A superset of Keras's own `run_layer_test`. A new layer joins by adding a `Case` to
`tests/layers/test_contract.py`; the checks below then hold it to what
`docs/design/architecture.md` says always holds.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src import testing

from keras_moe import exporting, layers

D = 6  # model width of all contract inputs


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer as the contract sees it.

    Attributes:
        layer: the class.
        arguments: constructor arguments, JSON-like.
        is_rowwise: whether a token's output depends on that token alone (no capacity competition).
        is_batchwise: whether an example's output depends on that example alone.
        mixes_tokens: whether a token sees the others of its sequence (soft routing).
        trainable, non_trainable, seeds, losses: what `run_layer_test` counts.
    """

    layer: type[keras.layers.Layer]
    arguments: dict[str, Any]
    trainable: int
    non_trainable: int
    losses: int = 0
    seeds: int = 0
    output_dim: int = D
    is_rowwise: bool = True
    is_batchwise: bool = True
    mixes_tokens: bool = False

    def make(self, **overrides: Any) -> keras.layers.Layer:
        return self.layer(**{**self.arguments, **overrides})


def tokens(batch: int = 4, length: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(batch, length, D)).astype("float32")


def only(applies: Callable[[Case], Any]) -> Callable[[Callable], Callable]:
    """Marks a check that some cases are collected for."""

    def mark(check: Callable) -> Callable:
        check.applies = applies
        return check

    return mark


def applies(check: Callable, case: Case) -> bool:
    return bool(getattr(check, "applies", lambda case: True)(case))


def assert_same(
    what: str, actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Fails unless two structures of tensors are alike, and says which tensor differs where."""
    actual, expected = arrays(actual), arrays(expected)
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors, not {len(expected)}"
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=f"{what}, tensor {index}")


def assert_near(what: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Fails unless all are within `tolerance` of the largest entry expected."""
    error, largest = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error < tolerance * largest, f"{what}: off by {error:.2e}, of {largest:.2e}"


def assert_finite(what: str, values: Any) -> None:
    for index, value in enumerate(arrays(values)):
        bad = np.argwhere(~np.isfinite(value))
        assert not len(bad), f"{what}, tensor {index}: not finite at {bad[0]} of {value}"


def assert_zero(what: str, values: Any) -> None:
    for index, value in enumerate(arrays(values)):
        assert not np.any(value), f"{what}, tensor {index}, should be 0: {value}"


def arrays(outputs: Any) -> list[np.ndarray]:
    """The tensors of any structure as NumPy arrays."""
    return [ops.convert_to_numpy(leaf) for leaf in keras.tree.flatten(outputs)]


def run(layer: keras.layers.Layer, x: np.ndarray, mask: Any = None, **arguments: Any) -> Any:
    """Calls a layer, compiled on JAX, where an eager call compiles a hundred times.

    State is updated and `layer.losses` can be read afterwards, as after an eager call.
    """
    mask = None if mask is None else ops.convert_to_tensor(np.array(mask))
    if keras.backend.backend() != "jax":
        return layer(x, mask=mask, **arguments)
    if not layer.built:
        layer.build(x.shape)
    outputs, state, losses = _compiled(layer, tuple(sorted(arguments.items())))(
        [v.value for v in layer.trainable_variables],
        [v.value for v in layer.non_trainable_variables],
        ops.convert_to_tensor(x),
        mask,
    )
    for variable, value in zip(layer.non_trainable_variables, state, strict=True):
        variable.assign(value)
    layer._clear_losses()
    layer.add_loss(losses)
    return outputs


@functools.lru_cache(maxsize=4)  # what a check needs; programs of a whole run are gigabytes
def _compiled(layer: keras.layers.Layer, arguments: tuple) -> Callable[..., Any]:
    import jax

    def call(trainable: Any, non_trainable: Any, x: Any, mask: Any) -> Any:
        return layer.stateless_call(
            trainable, non_trainable, x, mask=mask, return_losses=True, **dict(arguments)
        )

    return jax.jit(call)


class KerasLayerTest(testing.TestCase):
    """Gives access to `run_layer_test`, which is a method of Keras's test case."""

    def runTest(self) -> None:  # what unittest wants of an instance
        return None


def check_keras_layer_test(case: Case) -> None:
    """Config round trip, building, symbolic and eager calls, a training step, mixed precision."""
    KerasLayerTest().run_layer_test(
        case.layer,
        init_kwargs=case.arguments,
        input_shape=(2, 3, D),
        expected_num_trainable_weights=case.trainable,
        # The coefficients of losses are one weight more, what is counted by batch are two.
        expected_num_non_trainable_weights=case.non_trainable
        + (case.losses > 0)
        + 2 * issubclass(case.layer, layers.MoE),
        expected_num_seed_generators=case.seeds,
        expected_num_losses=case.losses,
        supports_masking=True,
        # On TensorFlow it feeds a generator of lists to `tf.data`, which takes none.
        run_training_check=not isinstance(case.arguments.get("tasks"), int),
    )


def check_config_is_json(case: Case) -> None:
    layer = case.make()
    config = layer.get_config()
    again = case.layer.from_config(json.loads(json.dumps(config)))
    assert json.dumps(again.get_config(), sort_keys=True) == json.dumps(config, sort_keys=True)


def check_any_rank(case: Case) -> None:
    for shape in [(5, D), (2, 3, D), (2, 3, 4, D)]:
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        layer = case.make()
        symbolic = layer(keras.Input(shape[1:]))
        for output, spec in zip(arrays(run(layer, x)), keras.tree.flatten(symbolic), strict=True):
            assert output.shape == (*shape[:-1], case.output_dim)
            assert tuple(spec.shape) == (None, *shape[1:-1], case.output_dim)


def check_unknown_sizes(case: Case) -> None:
    """One functional model, built with unknown batch and sequence sizes, serves any of them."""
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, keras.tree.flatten(case.make()(inputs)))
    for batch, length in [(1, 1), (5, 3)]:
        for output in keras.tree.flatten(model.predict(tokens(batch, length), verbose=0)):
            assert output.shape == (batch, length, case.output_dim)
            assert np.isfinite(output).all()


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class Block(keras.layers.Layer):
    """A layer of one's own around a mixture, as people write the block of a Transformer."""

    def __init__(self, mixture: keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mixture, self.supports_masking = mixture, True

    def build(self, input_shape: Any) -> None:
        if not self.mixture.built:  # it comes built from a file
            self.mixture.build(input_shape)

    def call(self, x: Any, mask: Any = None, training: bool | None = None) -> Any:
        outputs = keras.tree.flatten(self.mixture(x, mask=mask, training=training))
        return x + ops.mean(sum(outputs), axis=-1, keepdims=True)  # of any width

    def get_config(self) -> dict[str, Any]:
        mixture = keras.saving.serialize_keras_object(self.mixture)
        return {**super().get_config(), "mixture": mixture}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Block":
        mixture = keras.saving.deserialize_keras_object(config["mixture"])
        return cls(**{**config, "mixture": mixture})


class Subclassed(keras.Model):
    """A subclassed model around a layer."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__()
        self.layer = layer

    def call(self, x: Any, training: bool | None = None) -> Any:
        return self.layer(x, training=training)


def check_inside_other_layers(case: Case) -> None:
    """Symbolic calls of unknown batch and length, through `call` of layers that are not ours."""
    inputs, mask = keras.Input((None, D)), keras.Input((None,), dtype="bool")
    assert tuple(Block(case.make())(inputs, mask=mask).shape) == (None, None, D)
    nested = Subclassed(Subclassed(Block(case.make())))
    assert tuple(nested(keras.Input((7, D)), training=True).shape) == (None, 7, D)


def check_empty_batch(case: Case) -> None:
    calls = [((0, 3, D), False), *((shape, True) for shape in [(0, 3, D), (2, 0, D), (0, D)])]
    for shape, training in calls:
        layer = case.make()
        for output in arrays(run(layer, np.zeros(shape, "float32"), training=training)):
            assert output.shape == (*shape[:-1], case.output_dim)
        assert_finite(f"losses of {shape}", layer.losses)
        assert_zero(f"counts of {shape}", layer.running_counts())


def check_one_token_and_more_experts_than_tokens(case: Case) -> None:
    for training in (False, True):
        layer = case.make()
        assert_finite("outputs", run(layer, tokens(1, 1), training=training))
        assert_finite("losses", layer.losses)


def check_inference_is_deterministic(case: Case) -> None:
    layer, x = case.make(), tokens()
    once, twice = run(layer, x, training=False), run(layer, x, training=False)
    assert_same("the second call", twice, once, rtol=0, atol=0)


@only(lambda case: case.is_batchwise)
def check_examples_are_independent(case: Case) -> None:
    """Without a capacity shared by the batch, no output depends on the rest of the batch."""
    layer, x = case.make(), tokens(batch=6)
    together = arrays(run(layer, x, training=False))
    alone = run(layer, x[2:3], training=False)
    assert_same("example 2 alone", alone, [whole[2:3] for whole in together])


def check_padding_changes_nothing(case: Case) -> None:
    """Padded with garbage and a mask, the real tokens' outputs and the losses are the same."""
    layer = case.make(**_without_drops(case))
    x = tokens(3, 4)
    padded = np.concatenate([x, np.full((3, 3, D), np.nan, "float32")], axis=1)
    mask = np.arange(7) < 4
    mask = np.broadcast_to(mask, (3, 7))
    plain = arrays(run(layer, x, training=False))
    plain_losses = arrays(layer.losses)
    masked = arrays(run(layer, padded, mask=mask, training=False))
    assert_same("real tokens", [whole[:, :4] for whole in masked], plain)
    assert_zero("padding", [whole[:, 4:] for whole in masked])
    assert_same("losses", layer.losses, plain_losses, atol=0)


def check_everything_masked(case: Case) -> None:
    """Nothing but padding: zero outputs, finite losses, zero counts, finite gradients."""
    layer, x = case.make(), tokens(2, 3)
    mask = np.zeros((2, 3), "bool")
    assert_zero("outputs", run(layer, x, mask=mask, training=True))
    assert_finite("losses", layer.losses)
    assert_zero("counts", layer.running_counts())


def check_padding_is_not_counted(case: Case) -> None:
    layer = case.make()
    x, mask = tokens(2, 4), np.array([[1, 1, 0, 0], [1, 0, 0, 0]], "bool")
    run(layer, x, mask=mask, training=False)
    assert_zero("counts after inference", layer.running_counts())
    run(layer, x, mask=mask, training=True)
    counts = layer.running_counts()
    if getattr(layer, "routing_level", "token") == "token":
        assert counts["decisions"] == 3
    else:
        assert counts["decisions"] == 2
    layer.reset_running_counts()
    assert_zero("counts after a reset", layer.running_counts())


@only(lambda case: case.is_rowwise)
def check_bad_row_stays_alone(case: Case) -> None:
    """A NaN or Inf token is in its own output row and in nobody else's."""
    layer, x = case.make(), tokens()
    clean = arrays(run(layer, x, training=False))
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[1, 2, 3] = bad
        dirty = [output.copy() for output in arrays(run(layer, spoilt, training=False))]
        for a, b in zip(clean, dirty, strict=True):
            assert not np.isfinite(b[1, 2]).all(), f"{bad} gave {b[1, 2]}"
            b[1, 2] = a[1, 2]
        assert_same(f"other rows than that of {bad}", dirty, clean)


def check_experts_start_different(case: Case) -> None:
    layer = case.make()
    layer.build(tokens().shape)
    kernels = [w for w in layer.trainable_weights if "experts" in w.path and "kernel" in w.path]
    stacked = [ops.convert_to_numpy(w.value) for w in kernels if len(w.shape) == 3]
    assert stacked or "expert_0" in kernels[0].path
    if not stacked:
        first_kernel, *others = [ops.convert_to_numpy(w.value) for w in kernels]
        stacked = [np.stack([first_kernel, *(o for o in others if o.shape == first_kernel.shape)])]
        assert len(stacked[0]) > 1
    for kernel in stacked:
        for expert in range(1, kernel.shape[0]):
            assert np.abs(kernel[expert] - kernel[0]).max() > 1e-3, f"expert {expert} is expert 0"


def check_frozen(case: Case) -> None:
    """Frozen by argument, before or after building, from a config: nothing trains, no loss is left.

    A part that is frozen alone stays frozen in what is made of the config.
    """

    def trained(layer: keras.layers.Layer) -> set[str]:
        if not layer.built:
            layer.build((None, 3, D))
        return {v.path.removeprefix(f"{layer.name}/") for v in layer.variables if v.trainable}

    by_argument, before, after = case.make(trainable=False), case.make(), case.make()
    before.trainable = False
    everything = trained(after)
    assert len(everything) == case.trainable
    after.trainable = False
    again = case.layer.from_config(after.get_config())
    for layer in (by_argument, before, after, again):
        assert not trained(layer)
        run(layer, tokens(), training=True)
        assert not arrays(layer.losses)
    after.trainable = True
    assert trained(after) == everything

    for part in case.layer.parts:
        layer = case.make()
        if getattr(layer, part) is None:
            continue
        getattr(layer, part).trainable = False
        others = {path for path in everything if not path.startswith(f"{part}/")}
        assert trained(layer) == others
        assert trained(case.layer.from_config(layer.get_config())) == others


def check_mixed_precision(case: Case) -> None:
    """Outputs in the compute dtype, near the float32 ones; weights, routers and counts float32."""
    reference, x = case.make(**_without_drops(case)), tokens()
    expected = arrays(run(reference, x))
    # Half the programs where each is compiled; `check_pure_precision` has both there too.
    is_eager = keras.backend.backend() == "torch"
    for policy in ["mixed_bfloat16"] + ["mixed_float16"] * is_eager:
        layer = case.make(**_without_drops(case), dtype=policy)
        layer.build(x.shape)
        layer.set_weights(reference.get_weights())
        outputs = keras.tree.flatten(run(layer, x, training=False))
        for output, wanted in zip(outputs, expected, strict=True):
            assert keras.backend.standardize_dtype(output.dtype) == layer.compute_dtype
            got = ops.convert_to_numpy(ops.cast(output, "float32"))
            assert_near(policy, got, wanted, 0.05)
        for weight in layer.weights:
            assert keras.backend.standardize_dtype(weight.dtype) == "float32", weight.path
        for sublayer in layer._flatten_layers(include_self=False):
            if sublayer.name in ("router", "gates"):
                assert sublayer.compute_dtype == "float32"
        for loss in keras.tree.flatten(layer.losses):
            assert keras.backend.standardize_dtype(loss.dtype) == "float32"


def check_pure_precision(case: Case) -> None:
    """Outputs and weights in the policy's dtype, near the float32 ones."""
    reference, x = case.make(**_without_drops(case)), tokens()
    expected = arrays(run(reference, x))
    # JAX has no float64 unless it is switched on for the whole process.
    policies = ["bfloat16", "float16"] + ["float64"] * (keras.backend.backend() != "jax")
    for policy in policies:
        layer = case.make(**_without_drops(case), dtype=policy)
        layer.build(x.shape)
        layer.set_weights(reference.get_weights())
        outputs = keras.tree.flatten(run(layer, x, training=False))
        spec = keras.tree.flatten(layer(keras.Input((5, D), dtype=policy)))
        for output, wanted, symbolic in zip(outputs, expected, spec, strict=True):
            assert keras.backend.standardize_dtype(output.dtype) == symbolic.dtype == policy
            got = ops.convert_to_numpy(ops.cast(output, "float32"))
            assert_near(policy, got, wanted, 1e-5 if policy == "float64" else 0.05)


def check_fit(case: Case, jit_compile: bool, data: Callable[[], Any]) -> None:
    """Trains from unknown batch sizes, changes every trainable weight, and stays finite."""
    inputs = keras.Input((None, D))
    layer = case.make()
    outputs = keras.tree.flatten(layer(inputs))
    model = keras.Model(inputs, keras.layers.Add()(outputs) if len(outputs) > 1 else outputs[0])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit_compile)
    before = [ops.convert_to_numpy(w.value).copy() for w in layer.trainable_weights]
    history = model.fit(data(), epochs=2, verbose=0)
    assert_finite("loss", history.history["loss"])
    after = [ops.convert_to_numpy(w.value) for w in layer.trainable_weights]
    unchanged = [
        w.path
        for w, a, b in zip(layer.trainable_weights, before, after, strict=True)
        if np.array_equal(a, b)
    ]
    assert not unchanged


def check_save_and_load(case: Case, path: Any) -> None:
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, keras.tree.flatten(case.make()(inputs)))
    x = tokens()
    model.save(path)
    again = keras.saving.load_model(path)
    loaded = again.predict_on_batch(x)
    assert_same("the loaded model", loaded, model.predict_on_batch(x), rtol=0, atol=0)
    assert [w.path for w in again.weights] == [w.path for w in model.weights]


def check_return_routing(case: Case) -> None:
    """Symbolic and real records agree, and the layer's outputs do not change."""
    layer = case.make()
    inputs = keras.Input((None, D))
    symbolic = layer(inputs, return_routing=True)
    outputs, routing = run(layer, tokens(), return_routing=True)
    assert_same("outputs with a record", outputs, run(layer, tokens()))
    assert type(symbolic[1]) is type(routing)
    specs, leaves = keras.tree.flatten(symbolic), keras.tree.flatten((outputs, routing))
    for spec, leaf in zip(specs, leaves, strict=True):
        assert keras.backend.standardize_dtype(leaf.dtype) == spec.dtype
        assert len(spec.shape) == len(leaf.shape)
        for known, real in zip(spec.shape, leaf.shape, strict=True):
            assert known is None or known == real
    model = keras.Model(inputs, symbolic)
    assert_same("in a model", model.predict_on_batch(tokens()), (outputs, routing))


def check_exporting_changes_no_value(case: Case) -> None:
    """What is traced inside of `exporting` gives what is computed outside of it."""
    x, mask = tokens(3, 4), np.arange(12).reshape(3, 4) % 5 < 3
    layer = case.make()
    expected = arrays(run(layer, x, mask, training=False))
    _compiled.cache_clear()
    with exporting():
        outputs = arrays(run(layer, x, mask, training=False))
    _compiled.cache_clear()
    assert_same("while exporting", outputs, expected)


def check_mask_goes_on(case: Case) -> None:
    """The mask of an Embedding reaches the layer by itself and the layers after it."""
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(9, D, mask_zero=True)(inputs)
    outputs = keras.tree.flatten(case.make()(embedded))
    pooled = [keras.layers.GlobalAveragePooling1D()(output) for output in outputs]
    model = keras.Model(inputs, pooled)
    short, padded = np.array([[3, 5]]), np.array([[3, 5, 0, 0]])
    if case.is_batchwise and (case.is_rowwise or case.mixes_tokens):  # else padding takes slots
        longer = model.predict_on_batch(padded)
        assert_same("means over real tokens", longer, model.predict_on_batch(short))


def check_bad_inputs(case: Case) -> None:
    for bad, message in [
        (lambda: case.make()(np.zeros((D,), "float32")), "rank 2 or more"),
        (lambda: case.make()(keras.Input((3, None))), "known last dimension"),
        (
            lambda: case.make()(tokens(2, 3), mask=ops.ones((2, 4), dtype="bool")),
            "mask with one entry per token",
        ),
        (
            lambda: case.make()(tokens(2, 3), mask=ops.ones((2,), dtype="bool")),
            "mask with one entry per token",
        ),
    ]:
        try:
            bad()
        except ValueError as error:
            assert message in str(error), str(error)
            assert "Received:" in str(error)
        else:
            raise AssertionError(f"no error: {message}")


def _without_drops(case: Case) -> dict[str, Any]:
    """Padding counts in N, so capacity grows with it: enough slots for all make the two equal."""
    if case.arguments.get("capacity") is not None:
        return {"capacity": 1000}
    if case.arguments.get("capacity_factor") is None:
        return {}
    return {"capacity_factor": 100.0, "eval_capacity_factor": None}
