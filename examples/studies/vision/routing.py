"""Which patches go where: what the last mixture of a trained ViT does with test images."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras import ops

from vision.data import EVALUATION_BATCH, Images

ROWS = 6  # test images in the picture, one per class


@dataclass
class Use:
    """How a mixture shares out patches. Columns are experts, or the slots of Soft MoE."""

    layer: str
    is_soft: bool
    images: np.ndarray  # (rows,) places among the test images of those in `weights`
    # (rows, patches, columns). Of a slot: each patch's share in its input, 1 together. Of an
    # expert: what the patch takes of it, 0 where it was not chosen or was full.
    weights: np.ndarray
    sample: int  # test images that the means are over
    by_place: np.ndarray  # (patches, columns) the mean of `weights` over the sample
    contrast: np.ndarray  # (columns,) strongest patch over the mean, 1 for a slot that averages


def measure_use(classifier: keras.Model, images: Images, sample: int = 1000) -> Use:
    """Run the last mixture of the classifier on test images, with their routing."""
    rescale, network = classifier.layers
    layer = [part for part in network.layers if hasattr(part, "running_counts")][-1]
    is_soft = hasattr(layer, "slots_per_expert")
    sample = min(sample, len(images.test[0])) // EVALUATION_BATCH * EVALUATION_BATCH
    pixels, labels = images.test[0][:sample].astype("float32"), images.test[1][:sample]
    tokens = keras.Model(network.input, layer.input).predict(
        ops.convert_to_numpy(rescale(pixels)), batch_size=EVALUATION_BATCH, verbose=0
    )
    routing = keras.tree.map_structure(ops.convert_to_numpy, layer(tokens, return_routing=True)[1])
    if is_soft:
        weights = routing.dispatch.reshape(*routing.dispatch.shape[:2], -1)
    else:
        chosen = routing.experts[..., None] == np.arange(layer.num_experts)
        weights = (chosen * (routing.weights * routing.kept)[..., None]).sum(-2)
    rows = _one_per_class(labels)
    peak = weights.max(1) / np.maximum(weights.mean(1), 1e-9)
    return Use(
        layer=layer.name,
        is_soft=is_soft,
        images=rows,
        weights=weights[rows],
        sample=sample,
        by_place=weights.mean(0),
        contrast=peak.mean(0),
    )


def _one_per_class(labels: np.ndarray) -> np.ndarray:
    """Return the first image of each of `ROWS` classes, spread over all of them."""
    classes = np.unique(labels)
    spread = classes[np.linspace(0, len(classes) - 1, min(ROWS, len(classes))).astype(int)]
    return np.array([np.flatnonzero(labels == label)[0] for label in spread])
