"""Trains a model per layer, and the ready-made models, for two steps and saves them.

Run in a process per backend.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from inputs import ROWS_OF_IDS, inputs_of

from keras_moe import layers, models, routers

WIDTH = 6
ROUTERS = (
    *("noisy_top_k", "batch_priority", "no_token_left", "sinkhorn", "relu", "dselect_k"),
    *("expert_choice", "hash", "random", "uniform"),
)


def mixtures():
    """Every layer, with its branches."""
    return {
        "moe": layers.MoE(5, 8),
        "moe_glu": layers.MoE(5, 8, experts="glu", activation="silu", num_shared_experts=1),
        "moe_dense": layers.MoE(4, 8, router="dense"),
        "moe_capacity": layers.MoE(4, 8, capacity_factor=1.0, capacity_group="example"),
        "moe_example": layers.MoE(4, 8, routing_level="example"),
        "moe_template": layers.MoE(3, experts=keras.layers.Dense(WIDTH, activation="tanh")),
        "switch": layers.SwitchFFN(4, 8),
        **{f"moe_{name}": layers.MoE(5, 8, router=name) for name in ROUTERS},
        "moe_sigmoid_bias": layers.MoE(
            6,
            8,
            router=routers.SigmoidBiasRouter(
                6, 2, num_groups=3, top_groups=2, bias_update_rate=0.1, routed_scale=2.5
            ),
        ),
        "moe_token_hash": layers.MoE(5, 8, router=routers.TokenHashRouter(5, ROWS_OF_IDS, 2)),
        "soft": layers.SoftMoE(4, 8, slots_per_expert=2),
        "soft_glu": layers.SoftMoE(4, 8, experts="glu"),
        "mmoe": layers.MMoE(4, [8, WIDTH], tasks=["a", "b"], gate_dropout=0.1),
    }


def model_of(name, layer):
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(ROWS_OF_IDS, WIDTH, mask_zero=True)(inputs)
    more = {"token_ids": inputs} if "token_hash" in name else {}
    mixed = keras.tree.flatten(layer(embedded, **more))
    outputs = keras.layers.Add()(mixed) if len(mixed) > 1 else mixed[0]
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    return keras.Model(inputs, keras.layers.Dense(3)(pooled))


def ready_made():
    """The functional models of `keras_moe.models`."""
    small = {"patch_size": 2, "width": 8, "depth": 2, "num_heads": 2}
    features = models.features
    return {
        "vit": models.vit(
            (4, 4, 1),
            3,
            **small,
            qk_norm=True,
            dropout=0.1,
            feed_forward="soft_moe",
            feed_forward_arguments={"num_experts": 4},
        ),
        "ranker": models.multitask_ranker(
            [
                features.Categorical("user", ROWS_OF_IDS),
                features.Categorical("movie", ROWS_OF_IDS),
                features.History("recent", 5, of="movie"),
                features.MultiHot("genres", 4),
                features.Numeric("scalars", 3, mean=[0.0, 1.0, 2.0], variance=[1.0, 2.0, 3.0]),
            ],
            {"click": "binary", "rating": "regression"},
            interactions=[("user", "movie"), ("recent", "movie")],
        ),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    # Chosen, as experts choose between equal tokens by the last bit of their scores.
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    for name, model in ({n: model_of(n, m) for n, m in mixtures().items()} | ready_made()).items():
        inputs = inputs_of(model, examples=12, seed=0)
        targets = keras.tree.map_structure(
            lambda output: rng.normal(size=(12, output.shape[-1])), model.output
        )
        # Traces take longer than two steps without them.
        is_eager = keras.backend.backend() == "tensorflow"
        model.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=is_eager)
        model.fit(inputs, targets, batch_size=6, verbose=0)
        model.save(folder / f"{keras.backend.backend()}-{name}.keras")
