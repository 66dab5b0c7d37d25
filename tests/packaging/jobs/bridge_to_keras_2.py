"""Trains a layer of ours in a model of TensorFlow Recommenders for one step."""

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras

from keras_moe import layers
from keras_moe.integrations.tfrs import KerasBridge


class Ranker(tfrs.Model):
    def __init__(self):
        super().__init__()
        self.mixture = KerasBridge(layers.MoE(4, 8))
        self.head = tf_keras.layers.Dense(1)
        self.task = tfrs.tasks.Ranking(loss=tf_keras.losses.MeanSquaredError())

    def compute_loss(self, batch, training=False):
        x, y = batch
        return self.task(labels=y, predictions=self.head(self.mixture(x, training=training)))


data = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
model = Ranker()
model.mixture(data)
before = [weight.numpy() for weight in model.mixture.trainable_weights]
model.compile(tf_keras.optimizers.SGD(0.1))
model.fit(tf.data.Dataset.from_tensor_slices((data, data[:, :1])).batch(16), verbose=0)
after = [weight.numpy() for weight in model.mixture.trainable_weights]
assert all((old != new).any() for old, new in zip(before, after, strict=True))
