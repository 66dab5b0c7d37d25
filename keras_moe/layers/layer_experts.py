"""Keras layers as experts."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.arguments import KeepsArguments
from keras_moe.core.initializers import reseeded_config
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.dispatch import backend
from keras_moe.layers.freezing import freeze_parts
from keras_moe.layers.rematerialization import keep_from_remat
from keras_moe.layers.sublayers import adopt, build_by_call, check_free, config_of
from keras_moe.routers.loss_weights import refuse_loss_weights

_NUM_EXPERTS = "num_experts"  # in a file
# How far the seeds of blocks, and those of calls, lie apart: multiples of these two fractions of
# 2^32 meet late (Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
_BLOCK_STEP, _CALL_STEP = np.uint32(0xC13FA9A9), np.uint32(0x91E10DA5)


@keras.saving.register_keras_serializable(package="keras_moe")
class LayerExperts(KeepsArguments):
    """A bank of E separate Keras layers, each applied to its own rows `(rows, d)`.

    The general and slower path: E small calls instead of one batched matmul. An expert must treat
    rows one by one, as Dense, Dropout or LayerNormalization do: empty slots hold copies of a row
    that nobody reads, and what mixes rows (BatchNormalization in training) would see them. What an
    expert updates or adds as a loss in its `call` is kept with a capacity, but not by dropless
    dispatch, where one expert's rows come in several blocks.

    Args:
        experts: A layer, copied E times: each copy starts with random weights of its own, also
            where the layer is trained. Or a list of E layers, taken as they are, with their
            weights.
        num_experts: Positive integer, the number of experts E.
        copy_weights: Whether all copies start from the weights of the layer, which must be built:
            sparse upcycling (Komatsuzaki et al. 2022). A stored layer has its own weights, and this
            is False. Defaults to `False`.

    Call arguments:
        inputs: `(E, C, d)`, or `(1, C, d)` for rows that all experts read, or `(G, B, d)` with
            `block_experts`.
        block_experts: Optional int32 `(G,)`, the expert of each block.
        training: Passed to the experts that take it.

    Output shape:
        `(E, C, out)`, or `(G, B, out)` with `block_experts`.

    Raises:
        ValueError: if a list has another length than E, or something in it is not a layer; if
            `copy_weights` has no layer with weights to copy.
    """

    takes_dynamic_blocks = False  # XLA wants the rows of a mapped loop to be known

    def __init__(
        self,
        experts: keras.layers.Layer | Sequence[keras.layers.Layer],
        num_experts: int,
        *,
        copy_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs)
        super().__init__(**kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        if isinstance(experts, keras.layers.Layer):
            template = _of_rows(config_of(experts))
            copies = [self._copy(template, expert) for expert in range(num_experts)]
        else:
            copies = list(experts)
        if len(copies) != self.num_experts or not all(
            isinstance(expert, keras.layers.Layer) for expert in copies
        ):
            checks.fail(
                f"`experts` must be a Keras layer or a list of num_experts={num_experts} Keras "
                "layers.",
                experts=experts,
            )
        if len({id(expert) for expert in copies}) != len(copies):
            checks.fail(
                "`experts` must be distinct layers: a repeated one shares its weights.",
                experts=experts,
            )
        check_free(*copies)
        if copy_weights:
            _start_from(experts, copies)
        for expert in copies:
            adopt(expert)
        self.experts = copies
        freeze_parts(self)

    @staticmethod
    def _copy(template: Config, expert: int) -> keras.layers.Layer:
        copy = keras.saving.deserialize_keras_object(reseeded_config(template, "experts", expert))
        copy.name = f"expert_{expert}"
        return copy

    def build(self, input_shape: Shape) -> None:
        row_shape = (None, *tuple(input_shape)[2:])
        keep_from_remat(self.experts)  # the layer around the bank recomputes all of it
        for expert in self.experts:
            _build_for_rows(expert, row_shape)
            freeze_parts(expert)
        keep_from_remat(self.experts)  # what they made while they were built

    def call(
        self,
        inputs: Tensor,
        block_experts: Tensor | None = None,
        training: bool | None = None,
    ) -> Tensor:
        if block_experts is not None:
            outputs = self._call_blocks(inputs, block_experts)
            trained = [v.value for e in self.experts for v in e.trainable_variables]
            return backend.current.reach(outputs, trained)
        if inputs.shape[0] == 1:
            rows = [inputs[0]] * self.num_experts
        else:
            rows = ops.unstack(inputs, num=self.num_experts)
        return ops.stack([self._call_expert(index, part) for index, part in enumerate(rows)])

    def _call_expert(self, index: int, rows: Tensor) -> Tensor:
        return ops.cast(self.experts[index](rows), self.compute_dtype)

    def _call_blocks(self, blocks: Tensor, block_experts: Tensor) -> Tensor:
        """Runs one expert per block: a loop over blocks with a switch over experts."""
        if blocks.shape[0] == 0:  # PyTorch maps over nothing to nothing, without a shape
            _, *rest = self.compute_output_shape(tuple(blocks.shape))
            return ops.zeros((0, *rest), dtype=self.compute_dtype)
        states = [[(v, v.value) for v in expert.variables] for expert in self.experts]
        updated: set[int] = set()

        def branch(index: int) -> Callable[[Tensor, Tensor], Tensor]:
            def run(rows: Tensor, block: Tensor) -> Tensor:
                state = [(v, _state_of_block(v, value, block)) for v, value in states[index]]
                with _OfBlock(state, updated):
                    return self._call_expert(index, rows)

            return run

        branches = [branch(index) for index in range(self.num_experts)]
        count = ops.shape(blocks)[0]
        outputs = ops.map(
            lambda item: ops.switch(item[1], branches, item[0], item[2]),
            (blocks, block_experts, ops.arange(count, dtype="int32")),
        )
        for variable, value in (pair for state in states for pair in state):
            if _is_seed(variable) and id(variable) in updated:
                variable.assign(_reseeded(value, _CALL_STEP))
        return outputs

    def compute_output_spec(
        self,
        inputs: Tensor,
        block_experts: Tensor | None = None,
        training: bool | None = None,
    ) -> Tensor:
        first = self.num_experts if block_experts is None else inputs.shape[0]
        _, *rest = self.compute_output_shape(tuple(inputs.shape))
        return keras.KerasTensor((first, *rest), dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        _, rows, *width = tuple(input_shape)
        shapes = {
            tuple(
                expert.compute_output_spec(
                    keras.KerasTensor((rows, *width), dtype=expert.compute_dtype)
                ).shape
            )
            for expert in self.experts
        }
        if len(shapes) != 1:
            checks.fail("All `experts` must have one output shape.", shapes=sorted(shapes, key=str))
        return (self.num_experts, *shapes.pop())

    def get_config(self) -> Config:
        config: Config = super().get_config()
        return {
            **config,
            "experts": [config_of(expert) for expert in self.experts],
            "num_experts": self.num_experts,
            "copy_weights": False,
        }

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        store[_NUM_EXPERTS] = np.asarray(self.num_experts)

    def load_own_variables(self, store: Any) -> None:
        # Keras would take the first experts of a file. Older files have no number.
        saved = int(store[_NUM_EXPERTS][()]) if _NUM_EXPERTS in store.keys() else self.num_experts  # noqa: SIM118
        if saved != self.num_experts:
            checks.fail(
                f"`{self.name}` must be loaded from a file with num_experts={self.num_experts}.",
                num_experts=saved,
            )

    @classmethod
    def from_config(cls, config: Config) -> "LayerExperts":
        experts = [keras.saving.deserialize_keras_object(e) for e in config["experts"]]
        return cls(**{**config, "experts": experts})


def _of_rows(config: Config) -> Config:
    """The config of a layer that is called with `(rows, d)`, whatever it was called with before.

    A `Sequential` keeps the shape that it was built for, and would take no other.
    """
    if config["class_name"] != "Sequential":
        return config
    inner = {key: value for key, value in config["config"].items() if key != "build_input_shape"}
    first, *others = inner["layers"]
    is_of_more = first["class_name"] == "InputLayer" and len(first["config"]["batch_shape"]) > 2
    return {**config, "config": {**inner, "layers": others if is_of_more else inner["layers"]}}


def _build_for_rows(expert: keras.layers.Layer, shape: Shape) -> None:
    """Builds an expert, and says what it is called with where it takes something else."""
    try:
        build_by_call(expert, shape)
        if isinstance(expert, keras.Model):  # which may come built, for another shape
            expert(keras.KerasTensor(shape, dtype=expert.compute_dtype))
    except ValueError as error:
        checks.fail(
            f"An expert must take rows `(rows, d)`, here {tuple(shape)}: make it for "
            f"`keras.Input(({shape[-1]},))`. It fails with: {error}",
            expert=expert.name,
        )


def _start_from(trained: Any, copies: list[keras.layers.Layer]) -> None:
    """Builds the copies of a layer with its weights."""
    shape = None
    if isinstance(trained, keras.Model) and trained.built:
        shape = trained.input_shape
    elif isinstance(trained, keras.layers.Layer) and trained.built:
        shape = (trained.get_build_config() or {}).get("input_shape")
    if shape is None:
        checks.fail(
            "`copy_weights` needs `experts` to be one layer that is built, by `build((None, d))`.",
            experts=trained,
        )
    with keras.name_scope("experts"):
        for copy in copies:
            _build_for_rows(copy, (None, shape[-1]))
            copy.set_weights(trained.get_weights())


class _OfBlock(keras.StatelessScope):
    """Scope of one block: what a layer updates inside a traced loop must not leak out of it.

    Args:
        state: The variables of an expert and their values.
        updated: What gets the ids of the variables that are updated.
    """

    def __init__(self, state: list[tuple[Any, Tensor]], updated: set[int]) -> None:
        super().__init__(state)
        self._updated = updated

    def add_update(self, update: tuple[Any, Tensor]) -> None:
        super().add_update(update)
        self._updated.add(id(update[0]))


def _is_seed(variable: Any) -> bool:
    return bool(variable.name == "seed_generator_state")


def _state_of_block(variable: Any, value: Tensor, block: Tensor) -> Tensor:
    """Gives every block a seed of its own, and so other random numbers."""
    return _reseeded(value, _BLOCK_STEP, block + 1) if _is_seed(variable) else value


def _reseeded(state: Tensor, step: np.uint32, times: Tensor | int = 1) -> Tensor:
    """Moves the seed in a random state (seed, draws so far), in integers that wrap."""
    dtype = keras.backend.standardize_dtype(state.dtype)
    seed = ops.cast(times, dtype) * ops.convert_to_tensor(step.astype(dtype))
    return state + ops.stack([seed, ops.zeros_like(seed)])
