"""The losses of a layer's router: those of each call, times coefficients that may change."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.records import Routing
from keras_moe.core.several_calls import KeepsLosses
from keras_moe.core.types import Tensor
from keras_moe.layers.counts import RoutingCounts
from keras_moe.layers.loops import enclosing_loop
from keras_moe.routers import Router


class AddsRouterLosses(KeepsLosses):
    """Base of layers that add the losses of their router to the model's.

    The coefficients are a weight, `loss_weights (losses,)`, which a compiled training step reads
    anew each time. Keras's files leave it out: a loaded layer has those that it was made with.
    They leave out what was counted by batch, too.
    """

    router: Router
    _counts: RoutingCounts
    _loss_weights: Any = None
    _loss_names: tuple[str, ...] = ()  # of the losses that are on, in the order of the coefficients

    def _build_losses(self) -> None:
        on = {name: weight for name, weight in self.router.loss_weights.items() if weight}
        self._loss_names, initial = tuple(on), list(on.values())
        if initial:
            self._loss_weights = self.add_weight(
                name="loss_weights",
                shape=(len(initial),),
                initializer=lambda shape, dtype=None: ops.convert_to_tensor(initial, dtype),
                dtype="float32",
                trainable=False,
                autocast=False,
            )

    def _add_losses(self, decision: Routing) -> list[Tensor]:
        """Adds the router's losses, times their coefficients, to the model's; returns them."""
        losses: list[Tensor] = []
        if not self.router.trainable:  # Keras drops regularizers of frozen weights too
            return losses
        if enclosing_loop() is not None:  # which is not trained
            return losses
        for index, name in enumerate(self._loss_names):
            loss = self._loss_weights[index] * decision.losses[name]
            # In the dtype of the model's loss, to which TensorFlow adds no other.
            self.add_loss(ops.cast(loss, keras.config.floatx()))
            losses.append(loss)
        return losses

    @property
    def balance_weight(self) -> float:
        """The coefficient of the balance loss, 0 where the router has none; may be set."""
        return self._loss_weight("balance")

    @balance_weight.setter
    def balance_weight(self, weight: float) -> None:
        self.set_loss_weight("balance", weight)

    @property
    def z_loss_weight(self) -> float:
        """The coefficient of the router z-loss, 0 where the router has none; may be set."""
        return self._loss_weight("z_loss")

    @z_loss_weight.setter
    def z_loss_weight(self, weight: float) -> None:
        self.set_loss_weight("z_loss", weight)

    def _loss_weight(self, loss: str) -> float:
        if loss not in self._loss_names:
            return float(self.router.loss_weights.get(loss, 0.0))
        return float(self._loss_weights[self._loss_names.index(loss)])

    def set_loss_weight(self, loss: str, weight: float) -> None:
        """Changes the coefficient of a loss of the built layer, also between epochs of a training.

        A callback sets it at the start of an epoch: on JAX, what it sets between two batches of an
        epoch is lost.

        Args:
            loss: Name of a loss of the router, whose coefficient was above 0 when it was made.
            weight: Number of at least 0.

        Raises:
            ValueError: on another loss, a negative weight, or a layer that is not built.
        """
        weight = checks.non_negative("weight", weight)
        if not self.built:
            checks.fail("A layer must be built before its losses are changed.", built=False)
        names = self._loss_names
        if loss not in names:
            checks.fail(
                "A loss that is to be changed must have a coefficient above 0 when the layer is "
                f"made. Those are {list(names)}.",
                loss=loss,
            )
        values = [weight if name == loss else self._loss_weight(name) for name in names]
        self._loss_weights.assign(ops.convert_to_tensor(values, "float32"))

    def _unsaved(self) -> dict[str, Any]:
        """What files leave out, by the place that Keras gives it among the layer's own variables.

        The layer makes it after what is saved, so that the places of that stay the same.
        """
        if not self.built:
            return {}
        left_out = {id(self._loss_weights), *map(id, self._counts.by_batch.weights)}
        own = [*self._trainable_variables, *self._non_trainable_variables]
        return {
            str(place): variable for place, variable in enumerate(own) if id(variable) in left_out
        }

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        for place in self._unsaved():
            del store[place]

    def load_own_variables(self, store: Any) -> None:
        stored = {key: store[key] for key in store.keys()}  # noqa: SIM118
        super().load_own_variables(
            stored | {place: variable.numpy() for place, variable in self._unsaved().items()}
        )
