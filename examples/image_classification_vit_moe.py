"""Classify images with a Vision Transformer, and see which expert each patch takes.

A small ViT cuts each 28 x 28 image of Fashion-MNIST into 16 patches. In the last half of its blocks
the feed-forward layer is a `MoE`: 8 experts, of which a router picks two for each patch. Each has
half the width of a dense layer, so this model has more parameters than a dense ViT, and about the
same FLOPs per image. Both are trained here, and tested on the same images.

    KERAS_BACKEND=jax python examples/image_classification_vit_moe.py

Look at `results/images`: `patches.png`, test images and the experts of their patches;
`report.html`, a page about each layer's experts and the classes that they see; `mixture.keras`, the
model. Soft MoE, three seeds, intervals: `examples/studies/images.py`.
"""

from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

from keras_moe import callbacks, flops, models, plots, report

CLOTHES = ["T-shirt", "trouser", "pullover", "dress", "coat"]
CLOTHES += ["sandal", "shirt", "sneaker", "bag", "boot"]
MIXTURE = {"num_experts": 8, "top_k": 2, "hidden_dim": 64}


def load_images() -> tuple:
    """Return training images and labels, those to test on, and the names of the classes.

    The images are Fashion-MNIST, which Keras downloads once, or scikit-learn's digits without it.
    """
    try:
        (x, y), (x_test, y_test) = keras.datasets.fashion_mnist.load_data()
        names = CLOTHES
    except Exception as error:  # `load_data` raises nothing more precise
        print(f"{error}\nGoing on with the digits of scikit-learn.")
        digits = load_digits()
        images, labels, names = digits.images * 255 / 16, digits.target, list("0123456789")
        (x, y), (x_test, y_test) = (images[400:], labels[400:]), (images[:400], labels[:400])
    x, x_test = ((part[..., None] / 255).astype("float32") for part in (x, x_test))
    return x, y, x_test, y_test, names


def build(image_shape: tuple, feed_forward: str, arguments: dict | None = None) -> keras.Model:
    """Return a compiled ViT with such feed-forward layers in the last half of its blocks."""
    keras.utils.set_random_seed(0)
    model = models.vit(
        image_shape,
        num_classes=10,
        patch_size=image_shape[0] // 4,
        width=64,
        depth=4,
        num_heads=4,
        mlp_dim=128,
        feed_forward=feed_forward,
        feed_forward_arguments=arguments,
        name=feed_forward,
    )
    model.compile(
        keras.optimizers.AdamW(2e-3, weight_decay=1e-4),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def main(epochs: int = 2, folder: Path = Path("results/images")) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    x, y, x_test, y_test, names = load_images()
    accuracy = {}
    for feed_forward, arguments in (("dense", None), ("moe", MIXTURE)):
        model = build(x.shape[1:], feed_forward, arguments)
        work = flops.active_flops(model)
        print(f"\n{feed_forward}: {model.count_params():,} parameters, {work:,} FLOPs per image")
        watch = [callbacks.ExpertMonitor(json=folder / "experts.jsonl")] if arguments else []
        model.fit(x, y, batch_size=128, epochs=epochs, callbacks=watch, verbose=2)
        scores = model.evaluate(x_test, y_test, batch_size=200, verbose=0, return_dict=True)
        accuracy[feed_forward] = scores["accuracy"]

    print("\nAccuracy on the test images (one training each):", accuracy)
    model.save(folder / "mixture.keras")
    one_per_class = [int(np.argmax(y_test == label)) for label in range(10)]
    plots.patch_experts(
        model, x_test[one_per_class], layer="block_3_moe", titles=names, columns=10
    ).savefig(folder / "patches.png")
    page = report(
        model,
        (x_test, y_test),
        folder / "report.html",
        class_names=names,
        history=folder / "experts.jsonl",
        title="Which experts take which patches",
    )
    print(f"The picture, the page and the model: {page.parent}")
    return accuracy


if __name__ == "__main__":
    main()
