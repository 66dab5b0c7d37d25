"""Predict text, byte by byte, with a Switch Transformer, and see which expert each byte takes.

A small decoder reads 64 bytes of Python's documentation and predicts each next one. In every block
the feed-forward layer is a `SwitchFFN`: 8 experts, of which a router picks one for each byte. So
the model has four times the parameters of a dense one, at the same work per byte. Both are trained
here, and compared by the bits that a byte of held-out text costs: 8 for a model that knows nothing.

    KERAS_BACKEND=jax python examples/text_switch_transformer.py

Look at `results/text`: `experts.png`, a passage in the colours of its experts; `report.html`, a
page about each layer's experts; `switch.keras`, the model. Four models, three seeds each, with
intervals: `examples/studies/text.py`.
"""

import math
from pathlib import Path
from pydoc_data.topics import topics  # the language reference, which comes with Python

import keras
import numpy as np

from keras_moe import callbacks, flops, models, plots, report

CONTEXT = 64  # bytes that the model reads at most
SWITCH = {
    "num_experts": 8,
    # With a capacity, whether a byte finds room in its expert would depend on the rest of the
    # batch: fine in training, but not for a model that writes.
    "capacity_factor": None,
}


def load_windows() -> tuple[np.ndarray, np.ndarray]:
    """Return windows of CONTEXT + 1 bytes to train on and to test on."""
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    text = "\n\n".join(dict.fromkeys(paragraphs)).encode()  # each paragraph once
    starts = np.arange(0, len(text) - CONTEXT, CONTEXT)
    windows = np.frombuffer(text, "uint8")[starts[:, None] + np.arange(CONTEXT + 1)].astype("int32")
    held_out = len(windows) // 20
    return windows[:-held_out], windows[-held_out:]


def bits_per_byte(true, logits):
    """Return the code length of each byte: its loss, in bits."""
    loss = keras.losses.sparse_categorical_crossentropy(true, logits, from_logits=True)
    return loss / math.log(2)


def build(feed_forward: str, arguments: dict | None = None) -> keras.Model:
    """Return a compiled decoder with such feed-forward layers in both of its blocks."""
    keras.utils.set_random_seed(0)
    model = models.decoder(
        256,
        width=64,
        depth=2,
        num_heads=4,
        max_length=CONTEXT,
        feed_forward=feed_forward,
        feed_forward_arguments=arguments,
        name=feed_forward,
    )
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[bits_per_byte],
    )
    return model


def write(model: keras.Model, prompt: str, length: int = 200, temperature: float = 0.7) -> str:
    """Return the prompt and what the model writes after it, one byte at a time."""
    random = np.random.default_rng(0)
    text = list(prompt.encode())
    for _ in range(length):
        window = np.zeros((1, CONTEXT), "int32")  # one shape, which is compiled once
        seen = text[-CONTEXT:]
        window[0, : len(seen)] = seen
        logits = model.predict_on_batch(window)[0, len(seen) - 1] / temperature
        # The largest of logits and such noise is a draw from their softmax.
        text.append(int(np.argmax(logits + random.gumbel(size=256))))
    return bytes(text).decode(errors="replace")


def main(epochs: int = 6, limit: int | None = None, folder: Path = Path("results/text")) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    training, test = load_windows()
    training, x, y = training[:limit], test[:, :-1], test[:, 1:]
    bits = {}
    for feed_forward, arguments in (("dense", None), ("switch", SWITCH)):
        model = build(feed_forward, arguments)
        work = flops.active_flops(model, input_shape=(CONTEXT,)) // CONTEXT
        print(f"\n{feed_forward}: {model.count_params():,} parameters, {work:,} FLOPs per byte")
        watch = [callbacks.ExpertMonitor(json=folder / "experts.jsonl")] if arguments else []
        model.fit(
            training[:, :-1],
            training[:, 1:],
            batch_size=32,
            epochs=epochs,
            callbacks=watch,
            verbose=2,
        )
        bits[feed_forward] = model.evaluate(x, y, verbose=0, return_dict=True)["bits_per_byte"]

    print("\nBits per byte of held-out text (one training each, lower is better):", bits)
    print(write(model, "The "))
    model.save(folder / "switch.keras")
    characters = [bytes([byte]).decode(errors="replace") for byte in range(256)]
    shown = [characters[byte] for byte in x[1:5].reshape(-1)]
    picture = plots.token_experts(model, x[1:5], shown, layer="block_1_switch")
    picture.savefig(folder / "experts.png")
    page = report(
        model, x, folder / "report.html", vocabulary=characters, history=folder / "experts.jsonl"
    )
    print(f"Pictures, the page and the model: {page.parent}")
    return bits


if __name__ == "__main__":
    main()
