"""Runs mixtures on one device and divided among several; prints JSON.

Run in a process of its own: devices cannot be added to one that has begun.
"""

import json
import os
import re
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # run only once
)

import jax
import keras
import numpy as np
from keras import distribution

import keras_moe
from keras_moe import layers, routers

E, WIDTH, HIDDEN, BATCH, LENGTH = 8, 12, 16, 8, 6

DROPLESS = {
    "default": lambda: layers.MoE(E, HIDDEN),
    "gated, shared": lambda: layers.MoE(E, HIDDEN, experts="glu", num_shared_experts=1),
    "sigmoid_bias": lambda: layers.MoE(E, HIDDEN, router="sigmoid_bias"),
    "relu": lambda: layers.MoE(E, HIDDEN, router="relu"),
    "all losses": lambda: layers.MoE(
        E,
        HIDDEN,
        router=routers.TopKRouter(
            E, 2, losses=dict.fromkeys(routers.TopKRouter.LOSSES, 0.1), normalize=False
        ),
    ),
    "sinkhorn": lambda: layers.MoE(E, HIDDEN, router="sinkhorn"),
    "weighed inputs": lambda: layers.MoE(E, HIDDEN, weigh="inputs"),
    "by example": lambda: layers.MoE(E, HIDDEN, routing_level="example"),
    "Keras layers": lambda: layers.MoE(4, experts=keras.layers.Dense(WIDTH, "tanh")),
    "ample capacity": lambda: layers.MoE(E, HIDDEN, capacity_factor=8.0),
    "ample capacity, glu": lambda: layers.MoE(E, HIDDEN, experts="glu", capacity_factor=8.0),
    "capacity by example": lambda: layers.MoE(
        E, HIDDEN, capacity_factor=1.0, capacity_group="example"
    ),
    "few tokens by lookup": lambda: layers.MoE(E, HIDDEN, dispatch="lookup"),
    "dense": lambda: layers.MoE(E, HIDDEN, dispatch="dense"),
    "grouped": lambda: layers.MoE(E, HIDDEN, dispatch="grouped"),
    "padded blocks": lambda: layers.MoE(E, HIDDEN, dispatch="padded_blocks"),
    "rematerialized": lambda: _rematerialized(),
    "soft": lambda: layers.SoftMoE(E, HIDDEN),
}
PER_DEVICE = {
    "switch": lambda: layers.SwitchFFN(E, HIDDEN, capacity_factor=1.0, jitter=0.0),
    "batch_priority": lambda: layers.MoE(
        E, HIDDEN, router=routers.BatchPriorityRouter(E, noise_std=0.0), capacity_factor=0.5
    ),
    "expert_choice": lambda: layers.MoE(E, HIDDEN, router="expert_choice"),
}


def _rematerialized():
    with keras.RematScope(mode="full"):
        return layers.MoE(E, HIDDEN, dropout=0.0)


def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
    mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, size=BATCH)[:, None]
    return inputs, mask


def placements():
    """Distributions by name, made anew: one that is in force keeps what it has seen."""
    return {
        "alone": None,
        "batch": distribution.DataParallel(devices=distribution.list_devices()[:4]),
        "experts": keras_moe.distribution.expert_parallel(),
        "both": keras_moe.distribution.expert_parallel(data=2),
    }


def ran(make, placement, is_masked=True, examples=slice(None)):
    """What a training step of a layer gives: outputs, loss, gradients, and what it counted."""
    keras.utils.set_random_seed(1)
    distribution.set_distribution(placement)
    layer = make()
    inputs, mask = data()
    inputs, mask = inputs[examples], mask[examples]
    if placement is not None:
        inputs, mask = (
            jax.device_put(each, placement.get_data_layout(each.shape).backend_layout)
            for each in (inputs, mask)
        )
    layer.build((None, LENGTH, WIDTH))

    def loss(trained, untrained, inputs):
        outputs, untrained, losses = layer.stateless_call(
            trained,
            untrained,
            inputs,
            training=True,
            return_losses=True,
            **({"mask": mask} if is_masked else {}),
        )
        return (outputs**2).mean() + sum(losses), (outputs, untrained)

    trained = [variable.value for variable in layer.trainable_variables]
    untrained = [variable.value for variable in layer.non_trainable_variables]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))
    compiled = step.lower(trained, untrained, inputs).compile()
    (value, (outputs, untrained)), (gradients, grad_inputs) = compiled(trained, untrained, inputs)
    for variable, new in zip(layer.non_trainable_variables, untrained, strict=True):
        variable.assign(new)
    counts = {name: np.asarray(c).tolist() for name, c in layer.running_counts().items()}
    distribution.set_distribution(None)
    arrays = {
        "outputs": outputs,
        "by inputs": grad_inputs,
        **{
            variable.path.split("/", 1)[1]: gradient
            for variable, gradient in zip(layer.trainable_variables, gradients, strict=True)
        },
        **{
            variable.path.split("/", 1)[1]: variable.value
            for variable in layer.non_trainable_variables
            if variable.dtype == "float32"
        },
    }
    return {
        "loss": float(value),
        "arrays": {name: np.asarray(a).tolist() for name, a in arrays.items()},
        "counts": counts,
        "collectives": collectives(compiled.as_text()),
        "flops": compiled.cost_analysis()["flops"],
        "bytes": int(compiled.memory_analysis().argument_size_in_bytes),
    }


def collectives(program):
    """The shapes that devices exchange, by operation."""
    found = []
    for line in program.splitlines():
        match = re.search(
            r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
            r"(-start)?\(",
            line,
        )
        if match:
            found += [[match[2], shape] for shape in re.findall(r"[a-z]+\d*\[[\d,]*\]", match[1])]
    return found


def part(index, count):
    return slice(index * BATCH // count, (index + 1) * BATCH // count)


# Other names' experts are divided, or left alone, by what these show.
BY_BOTH = (
    "default",
    "gated, shared",
    "all losses",
    "weighed inputs",
    "Keras layers",
    "ample capacity",
    "grouped",
    "padded blocks",
    "soft",
)

result = {}
for name, make in DROPLESS.items():
    places = ["alone", "batch", *(["both"] if name in BY_BOTH else [])]
    result[name] = {place: ran(make, placements()[place]) for place in places}
result["default"]["experts"] = ran(DROPLESS["default"], placements()["experts"])
result["capacity"] = {
    place: ran(lambda: layers.MoE(E, HIDDEN, capacity_factor=2.0, dispatch="slots"), distribution_)
    for place, distribution_ in placements().items()
}
for name, make in PER_DEVICE.items():
    result[name] = {
        "batch": ran(make, placements()["batch"]),
        "both": ran(make, placements()["both"]),
        "quarters": [ran(make, None, examples=part(i, 4)) for i in range(4)],
        "halves": [ran(make, None, examples=part(i, 2)) for i in range(2)],
    }
json.dump(result, sys.stdout)
