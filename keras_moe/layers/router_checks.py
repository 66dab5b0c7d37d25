"""What a router and the layer around it can ask of each other."""

from keras_moe.core import checks
from keras_moe.core.capacity import Capacity
from keras_moe.routers import Router


def check_router(
    router: Router, capacity: Capacity, routing_level: str, capacity_group: str
) -> None:
    """Fails where a router cannot do what its layer is asked for."""
    if router.chooses_all:
        _check_room_for_all(capacity)
    for is_so, why in (
        (router.chooses_tokens, "experts choose their tokens"),
        (router.has_capacity, "the router has a capacity of its own"),
        (router.needs_token_ids, "the router reads token ids"),
        (router.reads_sequences, "there is a loss of each sequence"),
    ):
        if is_so and routing_level == "example":
            checks.fail(
                f"`routing_level` must be 'token' where {why}.", routing_level=routing_level
            )
    if router.has_capacity and capacity_group == "example":
        checks.fail(
            "`capacity_group` must be 'batch' where the router has a capacity of its own.",
            capacity_group=capacity_group,
        )


def _check_room_for_all(capacity: Capacity) -> None:
    if capacity.slots is not None:
        checks.fail(
            "`capacity` must be None with a router that sends every token to all experts.",
            capacity=capacity.slots,
        )
    factors = [f for f in (capacity.factor, capacity.eval_factor) if f is not None]
    if min(factors, default=1.0) < 1.0:
        checks.fail(
            "`capacity_factor` must be None, or at least 1, with a router that sends every token "
            "to all experts.",
            capacity_factor=capacity.factor,
        )
