"""Hypermodel of the Vision Transformer."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_moe.core import checks
from keras_moe.core.types import Config
from keras_moe.models.vit import VIT_SIZES, vit
from keras_moe.tuning._choices import Choices, candidates, checked, fully_declared
from keras_moe.tuning._keras_tuner import import_keras_tuner
from keras_moe.tuning.moe_space import moe_space
from keras_moe.tuning.soft_moe_space import soft_moe_space

if TYPE_CHECKING:
    from keras_tuner import HyperParameters

_HyperModel: Any = import_keras_tuner().HyperModel

_MIXTURES = ("moe", "soft_moe", "switch")
_SMALL = {"width": 64, "depth": 4, "num_heads": 4}
_SOFT_EXPERTS = (16, 8, 32)
_NOT_DECAYED = ["bias", "beta", "gamma", "scale", "position"]

FeedForward = str | Callable[[int], keras.layers.Layer]


class HyperViTMoE(_HyperModel):
    """Searches a `keras_moe.models.vit` classifier: its feed-forward, where it goes, and training.

    Each argument but the mappings is a value, which stays out of the search, or a list or tuple of
    values to choose from, the first of them the default. The defaults search mixtures of about the
    active FLOPs of the dense model: `MoE` and `SwitchFFN` with `mlp_dim` active hidden units per
    token, `SoftMoE` with as many slots as there are patches.

    Args:
        input_shape: `(height, width, channels)` of the images.
        num_classes: Positive integer, the classes; labels are integers.
        size: `"Ti"`, `"S"`, `"B"`, `"L"` or `"H"`, see `vit`. Defaults to `None`.
        patch_size: The side of a patch in pixels. Defaults to `16`.
        width: The model width d; None for that of `size`, or 64. Defaults to `None`.
        depth: The number of blocks; None for that of `size`, or 4. Defaults to `None`.
        num_heads: The attention heads; None for those of `size`, or 4. Defaults to `None`.
        mlp_dim: The hidden units of a dense feed-forward; None for those of `size`, or 4 `width`.
            Defaults to `None`.
        feed_forward: `"soft_moe"`, `"moe"`, `"switch"`, `"dense"`, or a function as in `vit`.
            Defaults to `("soft_moe", "moe", "switch", "dense")`.
        moe_layers: The blocks with the mixture, see `vit`: `"last_half"`, an integer, or a tuple of
            indices among the choices, `[(1, 3), "last_half"]`. Defaults to `"last_half"`.
        soft_moe: Arguments of `soft_moe_space` that narrow it, such as `{"num_experts": 16}`.
            Defaults to `None`.
        moe: Arguments of `moe_space` for "moe". Defaults to `None`.
        switch: Arguments of `moe_space` for "switch", without `router_arguments`. Defaults to
            `None`.
        qk_norm: Whether queries and keys are normalised. Defaults to `False`.
        dropout: Float in [0, 1), dropout of the model and of its experts. Defaults to `(0.0, 0.1)`.
        learning_rate: Learning rate of AdamW. Defaults to `(0.001, 0.0003, 0.003)`.
        weight_decay: Weight decay of kernels. Defaults to `0.05` (DeiT).
        clip_norm: Positive number, the norm that the gradient of each weight is clipped to, and a
            bank of experts is one weight; None for no clipping. Defaults to `1.0`.
        batch_size: The batch size; None leaves it to `tuner.search`. Defaults to `None`.
        jit_compile: Whether to compile by XLA, as in `Model.compile`. Defaults to `"auto"`.
        seed: Integer for weights, dropout and shuffling that are the same in every trial and every
            execution: passed to `keras.utils.set_random_seed` before a model is built. Defaults to
            `None`.
        name: Name of the hypermodel. Defaults to `None`.
        tunable: Whether the hyperparameters join the search, see `keras_tuner.HyperModel`. Defaults
            to `True`.

    Raises:
        ValueError: on no values to choose from, or values out of range.

    Example:

    >>> import keras_tuner
    >>> from keras_moe import tuning
    >>> hypermodel = tuning.HyperViTMoE(
    ...     (8, 8, 1), 10, patch_size=2, width=32, depth=2, num_heads=2,
    ...     feed_forward=("soft_moe", "dense"), soft_moe={"num_experts": (8, 16)},
    ... )
    >>> hp = keras_tuner.HyperParameters()
    >>> model = hypermodel.build(hp)  # the default
    >>> hp.values["feed_forward"], hp.values["soft_moe/num_experts"]
    ('soft_moe', 8)

    Reference:
        Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", section 3; Riquelme et
        al. 2021, "Scaling Vision with Sparse Mixture of Experts".
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        size: str | Sequence[str] | None = None,
        patch_size: int | Sequence[int] = 16,
        width: int | Sequence[int] | None = None,
        depth: int | Sequence[int] | None = None,
        num_heads: int | Sequence[int] | None = None,
        mlp_dim: int | Sequence[int] | None = None,
        feed_forward: FeedForward | Sequence[FeedForward] = ("soft_moe", "moe", "switch", "dense"),
        moe_layers: str | int | Sequence[str | int | Sequence[int]] = "last_half",
        soft_moe: Mapping[str, Any] | None = None,
        moe: Mapping[str, Any] | None = None,
        switch: Mapping[str, Any] | None = None,
        qk_norm: bool | Sequence[bool] = False,
        dropout: float | Sequence[float] = (0.0, 0.1),
        learning_rate: float | Sequence[float] = (0.001, 0.0003, 0.003),
        weight_decay: float | Sequence[float] = 0.05,
        clip_norm: float | None = 1.0,
        batch_size: int | Sequence[int] | None = None,
        jit_compile: bool | str = "auto",
        seed: int | None = None,
        name: str | None = None,
        tunable: bool = True,
    ) -> None:
        super().__init__(name=name, tunable=tunable)
        self._config: Config = {
            "input_shape": tuple(input_shape),
            "num_classes": num_classes,
            "size": size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "feed_forward": feed_forward,
            "moe_layers": moe_layers,
            "soft_moe": soft_moe,
            "moe": moe,
            "switch": switch,
            "qk_norm": qk_norm,
            "dropout": dropout,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "clip_norm": clip_norm,
            "batch_size": batch_size,
            "jit_compile": jit_compile,
            "seed": seed,
        }
        _check(self._config)
        for kind in ("soft_moe", "moe", "switch"):
            self._config[kind] = dict(self._config[kind] or {})

    def build(self, hp: "HyperParameters") -> keras.Model:
        """Returns the compiled model for the values of `hp`.

        Args:
            hp: a `keras_tuner.HyperParameters`.
        """
        config, choices = self._config, Choices(hp)

        def draw(argument: str, default: Any = None) -> Any:
            value = config[argument]
            return choices.draw(argument, default if value is None else value)

        size = draw("size")
        sizes = {part: draw(part, None if size else value) for part, value in _SMALL.items()}
        arguments = {**sizes, **{part: draw(part) for part in ("mlp_dim", "patch_size", "qk_norm")}}
        arguments["dropout"] = draw("dropout")
        kind = draw("feed_forward")
        with_mixture = [
            name for name in candidates("feed_forward", config["feed_forward"]) if name != "dense"
        ]
        with fully_declared(hp):
            placement = choices.draw(
                "moe_layers", config["moe_layers"], ("feed_forward", with_mixture)
            )
            mixtures = self._draw_mixtures(hp, choices, size, arguments)
        learning_rate, weight_decay = draw("learning_rate"), draw("weight_decay")
        draw("batch_size")  # declared here, so that the search knows it from the start

        if config["seed"] is not None:
            keras.utils.set_random_seed(config["seed"])
        if kind != "dense":
            arguments["moe_layers"] = placement
        model = vit(
            config["input_shape"],
            config["num_classes"],
            size=size,
            feed_forward=kind,
            feed_forward_arguments=mixtures.get(kind),
            classifier_activation=None,
            **arguments,
        )
        optimizer = keras.optimizers.AdamW(
            learning_rate, weight_decay=weight_decay, clipnorm=config["clip_norm"]
        )
        optimizer.exclude_from_weight_decay(var_names=_NOT_DECAYED)
        model.compile(
            optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=config["jit_compile"],
        )
        return model

    def fit(self, hp: "HyperParameters", model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        """Trains the model with what `tuner.search` was given, and the drawn batch size.

        Args:
            hp: a `keras_tuner.HyperParameters`.
            model: what `build` returned.
            *args: arguments of `Model.fit`.
            **kwargs: arguments of `Model.fit`.
        """
        batch_size = Choices(hp).draw("batch_size", self._config["batch_size"])
        if batch_size is not None:
            kwargs["batch_size"] = batch_size
        return model.fit(*args, **kwargs)

    def get_config(self) -> Config:
        """Returns the constructor's arguments, for `check_project`."""
        return dict(self._config)

    def _draw_mixtures(
        self,
        hp: "HyperParameters",
        choices: Choices,
        size: str | None,
        arguments: Mapping[str, Any],
    ) -> dict[Any, dict[str, Any]]:
        """Declares the spaces of all mixtures, and draws the arguments of the active one."""
        config = self._config
        kinds = candidates("feed_forward", config["feed_forward"])
        sizes = {**(VIT_SIZES[size] if size else {}), **_given(arguments)}
        mlp_dim = sizes.get("mlp_dim", 4 * sizes["width"])
        options: dict[str, dict[str, Any]] = {
            "moe": {},
            "switch": {"capacity_factor": (1.25, 1.0, 2.0), "z_loss_weight": 0.0},
            "soft_moe": {"num_experts": self._soft_experts()},
        }
        drawn: dict[Any, dict[str, Any]] = {}
        for kind in [name for name in kinds if name in _MIXTURES]:
            space = {"dropout": arguments["dropout"], **options[kind], **config[kind]}
            with choices.scope("feed_forward", [kind]):
                if kind == "soft_moe":
                    space.setdefault("hidden_dim", mlp_dim)
                    if "slots_per_expert" not in space:
                        space.setdefault("num_slots", self._patches(arguments["patch_size"]))
                    drawn[kind] = soft_moe_space(hp, kind, **space)
                    continue
                if "hidden_dim" not in space:
                    space.setdefault("active_hidden_dim", mlp_dim)
                if kind == "moe":
                    drawn[kind] = moe_space(hp, kind, **space)
                else:
                    drawn[kind] = moe_space(hp, kind, router="switch", **space)
                    drawn[kind].pop("router", None)
        return drawn

    def _patches(self, patch_size: int) -> int:
        height, width, _ = self._config["input_shape"]
        return max(1, (height // patch_size) * (width // patch_size))

    def _soft_experts(self) -> tuple[int, ...]:
        """Numbers of experts that have a slot each, whatever the patch size."""
        sizes = candidates("patch_size", self._config["patch_size"])
        slots = min(self._patches(patch_size) for patch_size in sizes)
        return tuple(experts for experts in _SOFT_EXPERTS if experts <= slots) or (slots,)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _check(config: Config) -> None:
    """Fails where an argument, or a value that a search may choose, is out of range."""
    for argument in ("patch_size", "width", "depth", "num_heads", "mlp_dim", "batch_size"):
        if config[argument] is not None:
            checked(checks.positive_int, argument, config[argument])
    checked(_check_feed_forward, "feed_forward", config["feed_forward"])
    checked(checks.rate, "dropout", config["dropout"])
    checked(checks.positive, "learning_rate", config["learning_rate"])
    checked(checks.non_negative, "weight_decay", config["weight_decay"])
    checks.optional(checks.positive, "clip_norm", config["clip_norm"])
    checks.optional(checks.integer, "seed", config["seed"])
    for kind in ("soft_moe", "moe", "switch"):
        if config[kind] is not None and kind not in candidates(
            "feed_forward", config["feed_forward"]
        ):
            checks.fail(
                f"`feed_forward` must include {kind!r} where `{kind}` is given.",
                feed_forward=config["feed_forward"],
            )
    if "router_arguments" in (config["switch"] or {}):
        checks.fail(
            "`switch` must leave out `router_arguments`: take 'moe' with the router 'switch'.",
            switch=config["switch"],
        )


def _check_feed_forward(name: str, value: Any) -> None:
    if isinstance(value, str) or not callable(value):
        checks.one_of(name, value, ["dense", *_MIXTURES])
