"""Draws what experts do, and writes a report."""

import keras
import numpy as np

import keras_moe
from keras_moe import layers, plots

inputs = keras.Input((4, 6))
x = layers.SoftMoE(2, 8, name="soft")(layers.MoE(4, 8, name="moe")(inputs))
outputs = layers.MMoE(3, [5], 2, name="tasks")(keras.ops.mean(x, axis=1))
model = keras.Model(inputs, outputs)
data = np.random.default_rng(0).normal(size=(8, 4, 6)).astype("float32")
labels = np.arange(8) % 2
plots.expert_load(model, data).savefig("load.png")
plots.token_experts(model, data[:1], list("abcd"), layer="moe").savefig("tokens.svg")
plots.patch_experts(model, data, layer="moe", pictures=np.zeros((8, 4, 4))).savefig("patches.pdf")
page = keras_moe.report(model, (data, labels), "page.html", pictures=np.zeros((8, 4, 4)))
assert page.read_text(encoding="utf-8").count("<img") > 5
