"""The verdict of the page: each number in its range or not, now and in training."""

import re

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import callbacks, layers
from keras_moe.inspection.alarms import alarms
from keras_moe.inspection.health import NAMES, health
from keras_moe.inspection.ranges import SOURCES, ranges_of
from keras_moe.reporting.summary import MEANINGS

pytestmark = pytest.mark.one_backend("a page is of NumPy arrays")
X = np.random.default_rng(0).normal(size=(256, 8)).astype("float32")


def model_of(mixture):
    inputs = keras.Input((8,))
    model = keras.Model(inputs, mixture(inputs))
    model.compile("sgd", "mse")
    return model


def trained(mixture, folder):
    model = model_of(mixture)
    monitor = callbacks.ExpertMonitor(json=folder / "h.jsonl", alarms=False)
    model.fit(X, X, batch_size=32, verbose=0, callbacks=[monitor])
    return model, folder / "h.jsonl"


def cells(page, column):
    """The class of each row's cell in a column of the last table, "" where it has none."""
    table = page.split("<table")[3]
    head = re.findall(r'<th scope="col">([^<]*)', table)
    rows = [row.split("<td>")[1:] for row in table.split("<tr>")[2:]]
    found = [re.match(r'<span class="(\w+)"', row[head.index(column) - 1]) for row in rows]
    return ["" if match is None else match[1] for match in found]


def test_what_training_dropped_is_seen(tmp_path):
    """At inference nothing is dropped, and the history tells of training."""
    keras.utils.set_random_seed(0)
    mixture = layers.MoE(4, 8, top_k=1, capacity_factor=0.6, eval_capacity_factor=4.0, name="moe")
    model, history = trained(mixture, tmp_path)
    page = keras_moe.report(model, X, tmp_path / "p.html", history=history).read_text("utf-8")
    assert cells(page, "dropped") == ["well", "ill"]
    assert cells(page, "confidence") == ["", ""]
    assert "Alarms in 1 of 1 mixture layer." in page
    assert "moe, in training, epoch 1" in page
    assert "<code>capacity_factor</code> of 1 or more, since 0.6 has room for 60 %" in page
    now = keras_moe.report(model, X, tmp_path / "q.html").read_text("utf-8")
    assert "No alarm in 1 mixture layer, of which 1 could be judged." in now
    assert 'class="ill"' not in now


def test_the_limit_of_inference_is_named(tmp_path):
    keras.utils.set_random_seed(0)
    mixture = layers.MoE(4, 8, top_k=1, capacity_factor=2.0, eval_capacity_factor=0.5, name="moe")
    page = keras_moe.report(model_of(mixture), X, tmp_path / "p.html").read_text("utf-8")
    assert "<code>eval_capacity_factor</code> of 1 or more, since 0.5 has room for 50 %" in page


def test_too_few_are_neither_well_nor_ill(tmp_path):
    model, _ = trained(layers.MoE(4, 8, name="moe"), tmp_path)
    page = keras_moe.report(model, X[:8], tmp_path / "p.html").read_text("utf-8")
    assert cells(page, "load cv") == [""]
    assert "of which 0 could be judged" in page


def test_a_history_of_another_model(tmp_path):
    _, history = trained(layers.MoE(4, 8, name="moe"), tmp_path)
    for other in (layers.MoE(3, 8, name="moe"), layers.MoE(4, 8, name="another")):
        with pytest.raises(ValueError, match=r"`history` must be of this model, whose mixtures"):
            keras_moe.report(model_of(other), X, tmp_path / "p.html", history=history)
    history.write_text("")
    with pytest.raises(ValueError, match=r"`history` must be a file with at least one epoch"):
        keras_moe.report(model_of(layers.MoE(4, 8)), X, tmp_path / "p.html", history=history)


LAYERS = {
    "moe": lambda: layers.MoE(4, 8, capacity_factor=1.0),
    "soft": lambda: layers.SoftMoE(4, 8),
    "mmoe": lambda: layers.MMoE(4, [8], 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_alarm_where_a_number_is_out_of_its_range(name):
    """Each of many counts, by chance, has an alarm if and only if one number is out of range."""
    layer = LAYERS[name]()
    layer(X[:8].reshape(2, 4, 8), training=True)
    random = np.random.default_rng(0)
    seen = set()
    for trial in range(300):
        counts = {key: np.array(value) for key, value in layer.running_counts().items()}
        shape = (2, 4) if name == "mmoe" else (4,)
        shares = random.dirichlet(np.full(4, 10.0 ** random.uniform(-1, 2)), shape[:-1])
        measure = "load" if name == "moe" else "importance"
        counts[measure] = 1000.0 * shares
        counts["decisions"] = np.array(1000.0)
        counts["entropy"] = 1000.0 * random.uniform(0, np.log(4), shape[:-1])
        if name == "moe":
            counts["assignments"] = np.array(1000.0)
            counts["dropped"] = np.array(random.uniform(0, 200))
        if name == "soft":
            counts["slot_importance"] = counts["importance"][:, None]
        values, ranges = health(counts, name == "moe"), ranges_of(layer, counts)
        kinds = {ranges[key].kind for key in ranges if values.get(key, 0.0) not in ranges[key]}
        found = {alarm.kind for alarm in alarms(layer, counts)}
        assert bool(found) == bool(kinds) or found == {"polarisation"}, (trial, kinds, found)
        seen |= found
    assert len(seen) >= 3


def test_numbers_are_explained():
    assert set(SOURCES) <= set(NAMES)
    assert set(NAMES) - set(MEANINGS) == {"slot_cosine", "task_entropy", "task_gates"}
