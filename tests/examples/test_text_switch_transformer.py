"""The text example: it learns, its files say so, and what it writes goes on with the prompt."""

import keras
import matplotlib.image
import numpy as np
import pytest
import text_switch_transformer as example


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run of 20 steps per model."""
    folder = tmp_path_factory.mktemp("text") / "out"
    return folder, example.main(epochs=1, limit=640, folder=folder)


def test_both_models_learn(ran):
    assert list(ran[1]) == ["dense", "switch"]
    assert max(ran[1].values()) < 6  # 8 before training


def test_saved_model_gives_the_bits_that_were_printed(ran):
    model = keras.saving.load_model(
        ran[0] / "switch.keras", custom_objects={"bits_per_byte": example.bits_per_byte}
    )
    _, test = example.load_windows()
    logits = model.predict(test[:, :-1], verbose=0).astype("float64")
    log_sum = np.log(np.exp(logits).sum(-1))
    of_next = np.take_along_axis(logits, test[:, 1:, None], -1)[..., 0]
    bits = np.mean(log_sum - of_next) / np.log(2)
    assert ran[1]["switch"] == pytest.approx(bits, rel=1e-4)


def test_page_and_picture_show_the_experts(ran):
    page = (ran[0] / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("block_0_switch", "block_1_switch"))
    assert page.count("<img") > 2
    assert matplotlib.image.imread(ran[0] / "experts.png")[..., :3].std() > 0.05


def test_held_out_windows_follow_the_others_and_repeat_no_paragraph():
    training, test = example.load_windows()
    assert training.shape[1] == test.shape[1] == example.CONTEXT + 1
    windows = np.concatenate([training, test])
    np.testing.assert_array_equal(windows[1:, 0], windows[:-1, -1])  # no byte is left out
    known, asked = (bytes(part[:, :-1].astype("uint8").ravel()) for part in (training, test))
    paragraphs = asked.split(b"\n\n")[1:-1]
    assert len(paragraphs) > 20
    assert not set(paragraphs) & set(known.split(b"\n\n"))


class Successor:
    """The next byte is the last one's successor; looks at nothing behind the last one."""

    def predict_on_batch(self, tokens):
        assert tokens.shape == (1, example.CONTEXT)
        logits = np.full((*tokens.shape, 256), -50.0, "float32")
        np.put_along_axis(logits, (tokens[..., None] + 1) % 256, 0.0, -1)
        return logits


def test_writes_on_beyond_the_context():
    begun = "".join(map(chr, range(32, 92)))
    assert example.write(Successor(), begun, length=30) == "".join(map(chr, range(32, 122)))
