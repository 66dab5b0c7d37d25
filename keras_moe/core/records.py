"""The records of decisions: what a router passes to a dispatcher, and what layers return."""

from typing import NamedTuple

from keras_moe.core.types import Tensor


class Routing(NamedTuple):
    """Decision of a token-choice router: a Keras tree, so it passes through `jit` and `Model`.

    Routers and dispatchers see flat tokens, `(N, ...)`. A layer called with `return_routing=True`
    returns the record with the token axes of its inputs, `(batch, ..., k)`, or `(batch, k)` where
    it routes whole examples.

    Attributes:
        experts: int32 `(N, k)`, the chosen experts, best first.
        weights: float32 `(N, k)`, the weight of each chosen expert's output.
        kept: bool `(N, k)`, False for padding, for assignments dropped for lack of capacity, and,
            where their number varies, for experts that a token does not take.
        asked: bool `(N, k)`, the same before drops: what is asked and not kept was dropped.
        logits: float32 `(N, E)`, the router's raw scores.
        load: float32 `(E,)`, assignments per expert, padding excluded, counted before drops.
        losses: the auxiliary losses by name, float32 scalars before their coefficients.
    """

    experts: Tensor
    weights: Tensor
    kept: Tensor
    asked: Tensor
    logits: Tensor
    load: Tensor
    losses: dict[str, Tensor]

    def by_token(self) -> dict[str, Tensor]:
        """The fields that have the axes of the tokens, for the outputs of a model.

        `predict` joins its batches along their first axis, which `load` and `losses` have not.
        """
        named = self._asdict()
        return {name: named[name] for name in ("experts", "weights", "kept", "asked", "logits")}


class SoftRouting(NamedTuple):
    """The mixing weights of `SoftMoE`, `(batch, tokens, E, P)` each, all float32.

    Attributes:
        dispatch: the share of each token in each slot's input; sums to 1 over the tokens. In a
            causal layer `(batch, tokens, tokens, E, P)`: entry [b, n, m] is the share of token m
            in the slots that token n reads, 0 for m > n.
        combine: the share of each slot's output in each token; sums to 1 over all slots.
        logits: the scores both are a softmax of; zeros where nothing is scored (see `mixing`).
    """

    dispatch: Tensor
    combine: Tensor
    logits: Tensor


class GateRouting(NamedTuple):
    """The gates of a multi-gate layer.

    Attributes:
        weights: `(..., tasks, E)`, what each task takes of each expert; sums to 1 over experts.
        logits: `(..., tasks, E)`, the scores before the softmax.
    """

    weights: Tensor
    logits: Tensor
