"""The image example, on the digits that it falls back to: it learns, and its files say so."""

import image_classification_vit_moe as example
import keras
import matplotlib.image
import numpy as np
import pytest


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run without a network."""

    def fail():
        raise Exception("URL fetch failure on https://example.org: None -- no route to host")

    folder = tmp_path_factory.mktemp("images") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.datasets.fashion_mnist, "load_data", fail)
        yield folder, example.main(epochs=5, folder=folder), example.load_images()


def test_both_models_learn(ran):
    assert list(ran[1]) == ["dense", "moe"]
    assert min(ran[1].values()) > 0.3  # of ten classes


def test_saved_model_gives_the_accuracy_that_was_printed(ran):
    folder, accuracy, (_, _, x, y, _) = ran
    predicted = keras.saving.load_model(folder / "mixture.keras").predict(x, verbose=0)
    assert accuracy["moe"] == pytest.approx(np.mean(predicted.argmax(-1) == y), abs=0.003)


def test_page_and_picture_show_the_experts(ran):
    page = (ran[0] / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("block_2_moe", "block_3_moe")) and page.count("<img") > 4
    assert matplotlib.image.imread(ran[0] / "patches.png")[..., :3].std() > 0.05


def test_parts_are_apart_and_pixels_go_from_0_to_1(ran):
    x, y, x_test, y_test, names = ran[2]
    assert (len(x), len(x_test), len(names)) == (1397, 400, 10)
    assert x.shape[1:] == (8, 8, 1) and (x.min(), x.max()) == (0, 1)
    assert not {image.tobytes() for image in x} & {image.tobytes() for image in x_test}
    assert set(y) == set(y_test) == set(range(10))


def test_fashion_mnist_is_taken_where_it_is_there(monkeypatch):
    part = np.full((3, 28, 28), 255, "uint8"), np.zeros(3, "uint8")
    monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", lambda: (part, part))
    x, _, x_test, _, names = example.load_images()
    assert x.shape == x_test.shape == (3, 28, 28, 1) and x.max() == 1 and names[0] == "T-shirt"
