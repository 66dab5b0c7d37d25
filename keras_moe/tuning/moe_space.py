"""Search space of the sparse mixture."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keras_moe.core import checks
from keras_moe.core.types import Config
from keras_moe.layers.sublayers import config_of
from keras_moe.routers.base import Router
from keras_moe.routers.registry import NAMED_ROUTERS
from keras_moe.tuning._choices import Choices, candidates, checked

if TYPE_CHECKING:
    from keras_tuner import HyperParameters

_HIDDEN_DIMS = (128, 64, 256)
# All experts are computed for every token, so that a capacity has nothing to bound.
_COMPUTE_ALL = ("dense", "dselect_k", "relu", "uniform")
# Around the papers' values, which come first.
_OWN_ARGUMENTS: dict[str, dict[str, Any]] = {
    "batch_priority": {"importance": (0.005, 0.0005, 0.05), "load": (0.005, 0.0005, 0.05)},
    "dselect_k": {"gamma": (1.0, 0.1, 10.0), "entropy": (1e-6, 1e-5, 1e-4)},
    "noisy_top_k": {"importance": (0.1, 0.01, 1.0), "load": (0.1, 0.01, 1.0)},
    "sigmoid_bias": {"bias_update_rate": (0.001, 0.0001, 0.01)},
}
_OF_THE_SPACE = ("num_experts", "top_k", "balance", "z_loss", "losses", "capacity_factor")


def moe_space(
    hp: "HyperParameters",
    name: str,
    *,
    num_experts: int | Sequence[int] = (8, 4, 16),
    hidden_dim: int | Sequence[int] | None = None,
    active_hidden_dim: int | Sequence[int] | None = None,
    router: str | Sequence[str] = "top_k",
    router_arguments: Mapping[str, Mapping[str, Any]] | None = None,
    top_k: int | Sequence[int] = (2, 1, 4),
    num_shared_experts: int | Sequence[int] = 0,
    capacity_factor: float | Sequence[float | None] | None = (None, 1.25, 2.0),
    eval_capacity_factor: float = 2.0,
    balance_weight: float | Sequence[float] = (0.01, 0.001, 0.1),
    z_loss_weight: float | Sequence[float] = 0.001,
    dropout: float | Sequence[float] = 0.0,
) -> Config:
    """Draws the arguments of a `MoE` layer.

    Each argument is a value, which stays out of the search, or a list or tuple of values to choose
    from, the first of them the default. Hyperparameters are named `{name}/{argument}`.

    `top_k` is never above `num_experts`: experts too few for every choice of `top_k` have a
    hyperparameter of their own, `{name}/top_k_up_to_{largest}`. A router has what follows below as
    far as it has a use for it, and arguments of its own. Several routers have a space each, named
    `{name}/{router}/{argument}`, which is declared in a conditional scope.

    Args:
        hp: A `keras_tuner.HyperParameters`.
        name: First part of the hyperparameters' names, another for each layer.
        num_experts: The experts E. Defaults to `(8, 4, 16)`.
        hidden_dim: The hidden width h of each expert; None for `(128, 64, 256)`. Defaults to
            `None`.
        active_hidden_dim: In place of `hidden_dim`, the hidden units that a token passes through
            in all: h = active_hidden_dim / (k + shared experts), rounded, so that every choice
            costs the FLOPs of a dense layer of this width. Defaults to `None`.
        router: The name of a router, any that `MoE` takes. A `decoder` refuses those that look
            ahead. Defaults to `"top_k"`.
        router_arguments: Dict of routers' names to dicts of their own arguments and coefficients of
            losses, each a value or values to choose from, such as `{"sinkhorn": {"iterations": (8,
            4)}}`. What is left out has its default, or is searched by default:
            `bias_update_rate` of "sigmoid_bias", `importance` and `load` of "noisy_top_k" and
            "batch_priority", `gamma` and `entropy` of "dselect_k". Defaults to `None`.
        top_k: The experts per token k; "switch" has 1, "dense" and "uniform" all. Defaults to
            `(2, 1, 4)`.
        num_shared_experts: Experts that every token passes through. Defaults to `0`.
        capacity_factor: Slots per expert over k N / E in training, None for dropless; not of
            routers that compute all experts, nor of "expert_choice", and never None of
            "no_token_left". 1.25 and 2.0 are Switch's and GShard's. Defaults to
            `(None, 1.25, 2.0)`.
        eval_capacity_factor: The same at inference where there is a capacity, never below the one
            in training. Defaults to `2.0` (Switch, ST-MoE).
        balance_weight: Coefficient of the balance loss, of routers that have one by default.
            Defaults to `(0.01, 0.001, 0.1)` (around Switch's).
        z_loss_weight: Coefficient of the router z-loss, of routers that have one by default.
            Defaults to `0.001` (ST-MoE).
        dropout: Dropout after the experts' hidden layer. Defaults to `0.0`.

    Returns:
        A dict of arguments of `MoE`, for any number of layers; empty inside of a conditional scope
        that is not active. A router with arguments of its own is a config.

    Raises:
        ValueError: on no values to choose from, values out of range, an unknown router, arguments
            of a router that is not searched, experts fewer than every choice of `top_k`, or both
            widths given.

    Example:

    >>> import keras_tuner
    >>> from keras_moe import layers, tuning
    >>> hp = keras_tuner.HyperParameters()
    >>> arguments = tuning.moe_space(hp, "block_3", active_hidden_dim=256)
    >>> arguments["top_k"], arguments["hidden_dim"]
    (2, 128)
    >>> layer = layers.MoE(**arguments)

    Reference:
        Fedus et al. 2021, "Switch Transformers", sections 2.2 and 2.4; Zoph et al. 2022,
        "ST-MoE", section 3.
    """
    space = _Space(
        num_experts=num_experts,
        hidden_dim=hidden_dim,
        active_hidden_dim=active_hidden_dim,
        router=router,
        router_arguments={} if router_arguments is None else router_arguments,
        top_k=top_k,
        num_shared_experts=num_shared_experts,
        capacity_factor=capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        balance_weight=balance_weight,
        z_loss_weight=z_loss_weight,
        dropout=dropout,
    )
    space.check()
    return space.draw(hp, name)


@dataclasses.dataclass(frozen=True)
class _Space:
    """The arguments of `moe_space`, each a value or a sequence of values to choose from."""

    num_experts: Any
    hidden_dim: Any
    active_hidden_dim: Any
    router: Any
    router_arguments: Mapping[str, Mapping[str, Any]]
    top_k: Any
    num_shared_experts: Any
    capacity_factor: Any
    eval_capacity_factor: float
    balance_weight: Any
    z_loss_weight: Any
    dropout: Any

    @property
    def width(self) -> tuple[str, Any]:
        """The argument that sets the hidden width, and its values."""
        if self.active_hidden_dim is not None:
            return "active_hidden_dim", self.active_hidden_dim
        return "hidden_dim", _HIDDEN_DIMS if self.hidden_dim is None else self.hidden_dim

    def check(self) -> None:
        """Fails where a value is out of range, or both widths are set."""
        for argument, check in _CHECKS.items():
            checked(check, argument, getattr(self, argument))
        checks.positive("eval_capacity_factor", self.eval_capacity_factor)
        if self.hidden_dim is not None and self.active_hidden_dim is not None:
            checks.fail(
                "`hidden_dim` must be None where `active_hidden_dim` is given.",
                hidden_dim=self.hidden_dim,
                active_hidden_dim=self.active_hidden_dim,
            )
        checked(checks.positive_int, *self.width)
        self._check_router_arguments()

    def _check_router_arguments(self) -> None:
        rules = candidates("router", self.router)
        if not isinstance(self.router_arguments, Mapping) or not set(self.router_arguments) <= set(
            rules
        ):
            checks.fail(
                f"`router_arguments` must be a dict of routers, of {sorted(rules)}, to dicts.",
                router_arguments=self.router_arguments,
            )
        for rule, arguments in self.router_arguments.items():
            for argument in set(arguments) & set(_OF_THE_SPACE):
                checks.fail(
                    "`router_arguments` must leave out what the space has an argument for.",
                    **{rule: argument},
                )

    def draw(self, hp: "HyperParameters", name: str) -> Config:
        """Draws a router and its arguments."""
        rules = candidates("router", self.router)
        choices = Choices(hp, name)
        rule = choices.draw("router", self.router)
        if len(rules) == 1:
            return self._draw_arguments(choices, rule)
        # KerasTuner holds conditions on hyperparameters one inside of the other only, so that a
        # `top_k` that depends on the router and on the experts needs experts of its own.
        drawn = {}
        for router in rules:
            with choices.scope("router", [router]):
                one = dataclasses.replace(self, router=router)
                drawn[router] = one.draw(hp, f"{name}/{router}")
        return drawn.get(rule, {})

    def _draw_arguments(self, choices: Choices, rule: str) -> Config:
        """Draws what the router `rule` has; nothing in a scope that is not active."""
        kind = NAMED_ROUTERS[rule]
        experts, top = choices.draw("num_experts", self.num_experts), {}
        if "top_k" in inspect.signature(kind.__init__).parameters:
            top = {"top_k": _draw_top_k(choices, self.num_experts, self.top_k)}
        shared = choices.draw("num_shared_experts", self.num_shared_experts)
        hidden = choices.draw(*self.width)
        if self.active_hidden_dim is not None:
            _check_divisible(
                self.active_hidden_dim, self._most_chosen(rule), self.num_shared_experts
            )
        losses = {}
        if kind.LOSSES.get("z_loss"):
            losses["z_loss"] = choices.draw("z_loss_weight", self.z_loss_weight)
        capacity = self._draw_capacity(choices, rule)
        if kind.LOSSES.get("balance"):
            losses["balance"] = choices.draw("balance_weight", self.balance_weight)
        dropout = choices.draw("dropout", self.dropout)
        own = {
            argument: choices.draw(argument, options)
            for argument, options in self._own_arguments(rule).items()
        }
        if not choices.is_active:
            return {}
        if None in top.values():
            checks.fail(
                f"`{choices.full_name('num_experts')}` must be one of "
                f"{candidates('num_experts', self.num_experts)}, for which this space has a "
                "`top_k`.",
                num_experts=experts,
            )
        router = _router(rule, experts, {**top, **capacity}, losses, own)
        if self.active_hidden_dim is not None:
            hidden = round(hidden / (router.experts_per_token + shared))
        weights = {f"{loss}_weight": weight for loss, weight in losses.items()}
        return {
            "num_experts": experts,
            "hidden_dim": hidden,
            "num_shared_experts": shared,
            "dropout": dropout,
            **top,
            **capacity,
            **({"router": config_of(router)} if own else {"router": rule, **weights}),
        }

    def _draw_capacity(self, choices: Choices, rule: str) -> Config:
        """Draws the capacities of a router that has some."""
        options = candidates("capacity_factor", self.capacity_factor)
        if NAMED_ROUTERS[rule].has_capacity:
            options = tuple(factor for factor in options if factor is not None)
        if rule in (*_COMPUTE_ALL, "expert_choice") or not options:
            return {}
        factor = choices.draw("capacity_factor", options)
        if factor is None:
            return {"capacity_factor": None}
        return {
            "capacity_factor": factor,
            "eval_capacity_factor": max(factor, self.eval_capacity_factor),
        }

    def _own_arguments(self, rule: str) -> dict[str, Any]:
        return {**_OWN_ARGUMENTS.get(rule, {}), **self.router_arguments.get(rule, {})}

    def _most_chosen(self, rule: str) -> int:
        """The most experts that any choice computes for a token."""
        most_experts = max(candidates("num_experts", self.num_experts))
        most_chosen = most_experts if rule in _COMPUTE_ALL else max(candidates("top_k", self.top_k))
        return 1 if rule == "switch" else min(most_chosen, most_experts)


def _router(rule: str, num_experts: int, arguments: Config, losses: Config, own: Config) -> Router:
    """Makes a router of what was drawn; `own` are its own arguments and coefficients of losses."""
    kind = NAMED_ROUTERS[rule]
    if not kind.has_capacity:  # the layer's
        arguments = {name: value for name, value in arguments.items() if name == "top_k"}
    arguments |= {name: value for name, value in own.items() if name not in kind.LOSSES}
    losses = {**losses, **{name: value for name, value in own.items() if name in kind.LOSSES}}
    losses = {"losses": losses} if losses else {}
    return kind(num_experts, **arguments, **losses, name="router")


_CHECKS: dict[str, Callable[..., Any]] = {
    "num_experts": checks.positive_int,
    "top_k": checks.positive_int,
    "router": lambda name, value: checks.one_of(name, value, NAMED_ROUTERS),
    "num_shared_experts": lambda name, value: checks.int_at_least(name, value, 0),
    "capacity_factor": lambda name, value: checks.optional(checks.positive, name, value),
    "balance_weight": checks.non_negative,
    "z_loss_weight": checks.non_negative,
    "dropout": checks.rate,
}


def _draw_top_k(choices: Choices, num_experts: Any, top_k: Any) -> int | None:
    """Draws k from the choices that the drawn number of experts allows."""
    all_experts, all_k = candidates("num_experts", num_experts), candidates("top_k", top_k)
    if min(all_experts) < min(all_k):
        checks.fail(
            "`top_k` must have a choice that is not above `num_experts`, for each choice of "
            "`num_experts`.",
            top_k=top_k,
            num_experts=num_experts,
        )
    experts_by_choices: dict[tuple[int, ...], list[int]] = {}
    for experts in all_experts:
        allowed = tuple(k for k in all_k if k <= experts)
        experts_by_choices.setdefault(allowed, []).append(experts)
    drawn = None
    for allowed, experts in experts_by_choices.items():
        # A name for each set of choices: KerasTuner's grid search takes hyperparameters of one name
        # for one, whatever their conditions.
        argument = "top_k" if allowed == all_k else f"top_k_up_to_{max(allowed)}"
        when = ("num_experts", experts) if len(experts_by_choices) > 1 else None
        drawn = choices.draw(argument, allowed, when) or drawn
    return drawn


def _check_divisible(active_hidden_dim: Any, most_chosen: int, num_shared_experts: Any) -> None:
    """Checks that there is a hidden unit for each expert that a token may pass through."""
    most = most_chosen + max(candidates("num_shared_experts", num_shared_experts))
    if min(candidates("active_hidden_dim", active_hidden_dim)) < most:
        checks.fail(
            f"`active_hidden_dim` must be at least {most}, the most experts that a token passes "
            "through.",
            active_hidden_dim=active_hidden_dim,
        )
