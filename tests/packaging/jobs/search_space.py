"""Searches a space of ours at random and by a Gaussian process, and builds both hypermodels."""

import keras
import keras_tuner
import numpy as np

from keras_moe import layers, models, tuning

X = np.random.default_rng(0).normal(size=(16, 4, 6)).astype("float32")
Y = X[:, 0, :1]


def build(hp):
    arguments = tuning.moe_space(hp, "moe", num_experts=(2, 4), hidden_dim=8)
    model = keras.Sequential([keras.Input((4, 6)), layers.MoE(**arguments), keras.layers.Flatten()])
    model.add(keras.layers.Dense(1))
    model.compile("adam", "mse")
    return model


for make in (keras_tuner.RandomSearch, keras_tuner.BayesianOptimization):
    cost = tuning.ActiveCost("val_loss", "min", target_flops=1e4)
    more = {"num_initial_points": 1} if make is keras_tuner.BayesianOptimization else {}
    tuner = make(
        build, cost.objective, max_trials=2, directory="search", project_name=make.__name__, **more
    )
    tuner.search(X, Y, validation_data=(X, Y), verbose=0, callbacks=[cost])
    assert len(tuner.oracle.trials) == 2
    assert tuner.oracle.get_best_trials(1)[0].metrics.get_best_value("active_flops") > 0

tasks = {"click": "binary", "like": "binary"}
features = [models.features.Numeric("x", 3)]
tuning.HyperMMoERecommender(features, tasks).build(keras_tuner.HyperParameters())
tuning.HyperViTMoE((4, 4, 1), 3, patch_size=2, width=8, depth=2, num_heads=2).build(
    keras_tuner.HyperParameters()
)
