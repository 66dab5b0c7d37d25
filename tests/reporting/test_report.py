"""The page is whole, true and harmless."""

import re
import sys
from html.parser import HTMLParser

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import callbacks, layers
from keras_moe.flops import active_parameters
from keras_moe.inspection.health import health
from keras_moe.reporting import parts
from keras_moe.reporting.summary import MEANINGS, UNJUDGED, all_parameters

pytestmark = pytest.mark.one_backend("a page is of NumPy arrays")

VOID = {"meta", "img"}
IMAGES = np.random.default_rng(0).normal(size=(48, 4, 4, 1)).astype("float32")
EVIL = '<script>"&'


class Page(HTMLParser):
    """Reads a page: its tags, which must be balanced, its tables, captions and links."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.tables, self.captions, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag == "data" and self.tables and "table" in self.open:
            self.tables[-1][-1][-1] = float(attributes["value"])
        if tag == "figcaption":
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "figcaption" in self.open:
            self.captions[-1] += data
        in_cell = {"th", "td"} & set(self.open)
        if in_cell and "data" not in self.open:
            self.tables[-1][-1][-1] += data

    def rows(self, number):
        """A table as dicts by column, by the rows' first cells."""
        head, *rows = self.tables[number]
        return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def model_of_all():
    """A model of images with a mixture of each family."""
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(6, 2, strides=2, data_format="channels_last")(inputs)
    x = keras.layers.Reshape((4, 6))(x)
    x = layers.MoE(4, 8, capacity_factor=0.8, name=EVIL)(x)
    x = layers.SoftMoE(3, 8, slots_per_expert=2, name="soft")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.MMoE(3, [6], [EVIL, "like"], name="tasks")(x), name="all")


def counts_of(model):
    return {
        layer.name: layer.running_counts()
        for layer in model.layers
        if hasattr(layer, "running_counts")
    }


def test_a_page_with_all_families(tmp_path):
    model = model_of_all()
    labels = np.arange(48) % 2
    path = keras_moe.report(
        model, IMAGES, tmp_path / "page.html", labels=labels, class_names=[EVIL, "$x_"]
    )
    page = Page(path)
    assert path == tmp_path / "page.html"
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "http" not in page.source
    assert all(link.startswith(("data:image/png;base64,", "#layer-")) for link in page.links)
    assert page.captions == [
        "How much each expert gets; 1 is a fair share.",
        "Which classes use which expert.",
        "Experts that get the same tokens.",
        "Images, and the experts that their patches take.",
        "Which classes use which expert.",
        "Slots that are alike mix the same tokens.",
        "Images, and the experts that their patches take.",
        "Images, and what each slot takes of their patches.",
        "Which classes use which expert.",
        "What each task takes of each expert.",
    ]
    assert page.tags.count("img") == len(page.captions)
    assert EVIL in page.text  # as text, with the h2 and the tables

    assert all(not np.any(counts["decisions"]) for counts in counts_of(model).values())
    model(IMAGES, training=True)  # no dropout and no noise: the same decisions
    numbers, what = page.rows(2), page.rows(1)
    columns = {column.replace(" ", "_") for column in numbers["tasks"]}
    assert columns <= set(MEANINGS)  # each is explained below
    for name, counts in counts_of(model).items():
        expected = health(counts, has_capacity=name == EVIL)
        shown = {column.replace(" ", "_"): value for column, value in numbers[name].items()}
        shown = {column: value for column, value in shown.items() if value != ""}
        assert shown == pytest.approx(expected, rel=1e-6)
        layer = model.get_layer(name)
        assert what[name]["parameters"] == all_parameters(layer)
        assert what[name]["active"] == active_parameters(layer)
    assert numbers[EVIL]["dropped"] > 0.1
    assert "of the assignments are dropped" in page.rows(0)[EVIL]["state"]
    assert page.rows(0)["soft"]["state"] == UNJUDGED or "alarm" in page.rows(0)["soft"]["state"]
    assert what[EVIL]["experts"] == "2 of 4" and what["soft"]["experts"] == "3, of 2 slots"


def test_a_page_of_text(tmp_path):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(5, 6, mask_zero=True)(inputs)
    moe = layers.MoE(5, 8, top_k=1, name="moe")
    model = keras.Model(inputs, moe(x))
    scores = np.zeros((5, 6), "float32")
    scores[:, :5] = 4.0 * np.eye(5)
    model.layers[1].embeddings.assign(scores)
    moe.router.kernel.assign(np.eye(6, 5, dtype="float32"))
    ids = np.array([[1, 2, 2, 0], [3, 4, 0, 0]])
    page = Page(
        keras_moe.report(model, ids, tmp_path / "p.html", vocabulary=["", "<b>", "a\n", "c", "d"])
    )
    rows = page.rows(3)
    assert [next(iter(rows[str(expert)].values())) for expert in range(5)] == [
        *("", "<b> 100 %", "a↵ 100 %", "c 100 %", "d 100 %")
    ]
    assert page.captions[-1] == "The first text, in the colours of its experts."
    assert "Experts that get the same tokens." not in page.captions  # one each
    given = [["<b>", "a\n", "a\n", ""], ["c", "d"]]
    again = Page(keras_moe.report(model, ids, tmp_path / "q.html", texts=given))
    assert again.source == page.source
    with pytest.raises(ValueError, match=r"`vocabulary` needs inputs that are ids of tokens"):
        keras_moe.report(model, ids[..., None], tmp_path / "r.html", vocabulary=["a"])


def test_texts_and_images_are_routed_with_their_batch(tmp_path, monkeypatch):
    drawn = {}
    for name in ("draw_tokens", "draw_patches"):
        draw = getattr(parts, name)

        def watch(name, *arguments, draw=draw, **more):
            drawn[draw.__name__] = arguments[0]
            return draw(name, *arguments, **more)

        monkeypatch.setattr(parts, name, watch)
    inputs = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(9, 6, mask_zero=True)(inputs)
    moe = layers.MoE(2, 8, top_k=1, capacity_factor=0.5, name="moe")
    model = keras.Model(inputs, moe(x))
    moe.router.kernel.assign(np.zeros((6, 2), "float32"))  # all want expert 0
    ids = np.array([[0, 3, 4, 0], [5, 6, 7, 8], [5, 6, 7, 8], [1, 1, 1, 1]])
    keras_moe.report(
        model, ids, tmp_path / "p.html", vocabulary=list("-abcdefgh"), pictures=np.ones((4, 2, 2))
    )
    with keras_moe.record_routing(model) as records:
        model(ids)
    kept = records["moe"][0].kept[..., 0]
    assert kept[0, 1] and kept[1, 0] and not kept[3].any()  # one text alone would keep one token
    # Without the padding at the ends; what found no room stays.
    np.testing.assert_array_equal(drawn["draw_tokens"].max(axis=-1) > 0, kept[0, 1:3])
    np.testing.assert_array_equal(drawn["draw_patches"].max(axis=-1) > 0, kept.reshape(4, 2, 2))


def test_history_and_title(tmp_path):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.MoE(4, 8, name="moe")(inputs))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    monitor = callbacks.ExpertMonitor(json=tmp_path / "h.jsonl", alarms=False)
    model.fit(x, x, verbose=0, callbacks=[monitor])
    before = model.layers[1].running_counts()
    page = Page(
        keras_moe.report(
            model, x, tmp_path / "p.html", history=tmp_path / "h.jsonl", title="<Mine>"
        )
    )
    assert page.captions[1] == "How that went in training, epoch by epoch."
    assert re.search(r"<h1>&lt;Mine&gt;</h1>", page.source)
    after = model.layers[1].running_counts()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])


def test_errors(tmp_path, monkeypatch):
    model = keras.Sequential([keras.layers.Dense(2)])
    model.build((None, 4))
    x = np.zeros((3, 4), "float32")
    with pytest.raises(ValueError, match="must have a mixture layer that is built"):
        keras_moe.report(model, x, tmp_path / "p.html")
    model = keras.Sequential([layers.MoE(2, 4)])
    model.build((None, 4))
    with pytest.raises(ValueError, match=r"`data` must have at least one example"):
        keras_moe.report(model, x[:0], tmp_path / "p.html")
    with pytest.raises(ValueError, match=r"`labels` must have one entry for each of 3 examples"):
        keras_moe.report(model, x, tmp_path / "p.html", labels=[1, 2])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "\.\[plot\]"'):
        keras_moe.report(model, x, tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


def test_layers_are_in_the_order_in_which_data_meets_them(tmp_path):
    class Backwards(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = layers.MMoE(2, [8], tasks=2, name="last")
            self.middle = layers.SoftMoE(2, 4, name="middle")
            self.first = layers.MoE(2, 4, name="first")

        def call(self, inputs):
            return self.last(self.middle(self.first(inputs))[:, 0])

    model = Backwards()
    tokens = IMAGES.reshape(-1, 4, 4)[:40]
    model(tokens)
    page = Page(keras_moe.report(model, tokens, tmp_path / "page.html"))
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)
    order = [
        name for heading in headings for name in ("first", "middle", "last") if name in heading
    ]
    assert order == ["first", "middle", "last"]
