"""Every helper that takes a model takes any kind of it, or says in a sentence what is wrong.

All models do the same to the same tokens, so each helper must say the same of all of them.
"""

import functools
from typing import NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe import callbacks, layers, plots, tuning
from keras_moe.flops import active_flops, active_parameters, count_products, layer_flops
from keras_moe.inspection.recording import count_routing
from keras_moe.models import task_gates
from keras_moe.reporting import page

pytestmark = pytest.mark.one_backend("helpers read what layers return")

N, T, D = 10, 4, 6  # examples, tokens, width
BATCH = 6  # 6 and 4: JAX compiles every operation for every size
TOKENS = np.random.default_rng(0).normal(size=(N, T, D)).astype("float32")
ADDED = np.random.default_rng(1).normal(size=(N, D)).astype("float32")
LABELS = np.arange(N) % 3
NAMES = ["moe", "soft", "tasks"]
MLP = 2 * (D * 8 + 8 * D)
FLOPS = (
    T * (2 * D * 4 + 2 * MLP)  # router, 2 of 4 experts
    + (3 * 2 * T * D * 2 + 2 * MLP)  # scores, slots in and out, 2 experts of a slot
    + (3 * 2 * D * 5 + 2 * 2 * D * 3 + 2 * 2 * 3 * 5)  # 3 experts, 2 gates, 2 mixes
    + 2 * 2 * 5  # heads
)
BIASED_MLP = D * 8 + 8 + 8 * D + D
PARAMETERS = (D * 4 + 2 * BIASED_MLP) + (D * 2 + 1 + 2 * BIASED_MLP) + (3 * 35 + 36) + 2 * 6


def mixtures():
    return (
        layers.MoE(4, 8, name="moe"),
        layers.SoftMoE(2, 8, name="soft"),
        layers.MMoE(3, [5], ["a", "b"], name="tasks"),
    )


def mixed(x, moe, soft, tasks):
    x = x + moe(x)
    x = x + soft(x)
    return tasks(ops.mean(x, axis=1))


@keras.saving.register_keras_serializable("any_model")
class Block(keras.layers.Layer):
    """A user's own layer around the mixtures, with what Keras asks for and no more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mixtures = list(mixtures())

    def call(self, x):
        return mixed(x, *self.mixtures)


@keras.saving.register_keras_serializable("any_model")
class BuiltBlock(Block):
    """The same with a `build`, as Keras wants it of a layer that is loaded from a file."""

    def build(self, shape):
        moe, soft, tasks = self.mixtures
        moe.build(shape)
        soft.build(shape)
        tasks.build((shape[0], shape[-1]))


@keras.saving.register_keras_serializable("any_model")
class Heads(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.heads = {task: keras.layers.Dense(1) for task in "ab"}

    def build(self, shapes):
        for task, head in self.heads.items():
            head.build(shapes[task])

    def call(self, mixed):
        return {task: head(mixed[task]) for task, head in self.heads.items()}


@keras.saving.register_keras_serializable("any_model")
class Own(keras.Model):
    """A subclassed model, of one input or of a dict of two."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.parts = [Block(), Heads()] if inner is None else [inner]

    def call(self, x):
        x = x["tokens"] + x["added"][:, None] if isinstance(x, dict) else x
        for part in self.parts:
            x = part(x)
        return x


def functional():
    inputs = keras.Input((T, D))
    return keras.Model(inputs, Heads()(mixed(inputs, *mixtures())), name="functional")


def two_inputs(as_dict):
    tokens, added = keras.Input((T, D), name="tokens"), keras.Input((D,), name="added")
    outputs = Heads()(mixed(tokens + added[:, None], *mixtures()))
    if as_dict:
        return keras.Model({"tokens": tokens, "added": added}, outputs)
    return keras.Model([tokens, added], list(outputs.values()))


def around(*parts):
    inputs = outputs = keras.Input((T, D))
    for part in parts:
        outputs = part(outputs)
    return keras.Model(inputs, outputs)


def loaded(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras", compile=False)


def rows(x, *places):
    return keras.tree.map_structure(lambda each: each[slice(*places)], x)


def shapes_of(x):
    return keras.tree.map_structure(lambda each: each.shape[1:], x)


def batches(x):
    return [rows(x, BATCH), rows(x, BATCH, N)]


def called(model, x=TOKENS):
    model(batches(x)[1])
    return model


ONE, DICT, LIST = TOKENS, {"tokens": TOKENS, "added": ADDED}, [TOKENS, ADDED]
KINDS = {  # what makes the model, in a folder, and its inputs
    "functional": (lambda _: functional(), ONE),
    "a dict of inputs and outputs": (lambda _: two_inputs(True), DICT),
    "a list of inputs and outputs": (lambda _: two_inputs(False), LIST),
    "sequential": (lambda _: keras.Sequential([keras.Input((T, D)), Block(), Heads()]), ONE),
    "sequential, called": (lambda _: called(keras.Sequential([Block(), Heads()])), ONE),
    "own block in a functional one": (lambda _: around(Block(), Heads()), ONE),
    "subclassed": (lambda _: called(Own()), ONE),
    "subclassed, a dict": (lambda _: called(Own(), DICT), DICT),
    "nested in a functional one": (lambda _: around(functional()), ONE),
    "nested in a sequential one": (lambda _: called(keras.Sequential([functional()])), ONE),
    "nested in a subclassed one": (lambda _: called(Own(functional())), ONE),
    "loaded": (lambda folder: loaded(functional(), folder), ONE),
    "subclassed, loaded": (lambda folder: loaded(called(Own()), folder), ONE),
    "cloned": (lambda _: keras.models.clone_model(functional()), ONE),
    "a layer": (lambda _: called(BuiltBlock()), ONE),
}


class Expected(NamedTuple):
    """What the mixtures decide."""

    experts: np.ndarray
    weights: np.ndarray
    combine: np.ndarray
    gates: np.ndarray


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Makes each model once: by kind, the model, its inputs, and what its mixtures decide."""

    @functools.cache
    def make(kind):
        construct, x = KINDS[kind]
        model = construct(tmp_path_factory.mktemp("model"))
        return model, x, decisions(model, x)

    return make


def decisions(model, x):
    """What the mixtures return when they are called by hand, as NumPy arrays."""
    moe, soft, tasks = (
        next(each for each in model._flatten_layers() if each.name == name) for name in NAMES
    )
    parts = []
    for tokens in batches(TOKENS if x is ONE else TOKENS + ADDED[:, None]):
        y, sparse = moe(tokens, return_routing=True)
        y = ops.add(tokens, y)
        z, slots = soft(y, return_routing=True)
        _, gates = tasks(ops.mean(y + z, axis=1), return_routing=True)
        found = Expected(sparse.experts, sparse.weights, slots.combine, gates.weights)
        parts.append(keras.tree.map_structure(ops.convert_to_numpy, found))
    return keras.tree.map_structure(lambda *each: np.concatenate(each), *parts)


def chosen(expected):
    """How many tokens of an example go to each expert, `(N, E)`."""
    return np.eye(4)[expected.experts].sum(axis=(1, 2))


def matrix(figure):
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def is_block(model):
    """Whether it is the block alone, without heads."""
    return not isinstance(model, keras.Model)


def parameters(model):
    return PARAMETERS - 12 * is_block(model)


def close(actual, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(actual), expected, rtol=1e-4, atol=1e-6)


# === Each helper, of each kind ===


def check_record_routing(model, x, expected, tmp_path):
    with keras_moe.record_routing(model) as records:
        for batch in batches(x):
            model(batch)
    assert list(records) == NAMES
    close(np.concatenate([each.weights for each in records["moe"]]), expected.weights)
    close(np.concatenate([each.combine for each in records["soft"]]), expected.combine)
    close(np.concatenate([each.weights for each in records["tasks"]]), expected.gates)


def check_count_routing(model, x, expected, tmp_path):
    with count_routing(model) as counts:
        for batch in batches(x):
            model(batch)
    close(counts["moe"]["load"], chosen(expected).sum(axis=0))
    close(counts["tasks"]["importance"], expected.gates.sum(axis=0))


def check_task_gates(model, x, expected, tmp_path):
    gates = task_gates(model)
    close(gates.predict(x, batch_size=N // 2, verbose=0), expected.gates)
    close(gates(batches(x)[0]), expected.gates[:BATCH])


def check_plots_of_load_and_pairs(model, x, expected, tmp_path):
    load = chosen(expected).sum(axis=0)
    close(matrix(plots.expert_load(model, x, batch_size=BATCH)), [load / load.mean()])
    taken = np.eye(4)[expected.experts].sum(axis=2).reshape(-1, 4)
    together = taken.T @ taken
    shares = together / np.maximum(np.diag(together)[:, None], 1)
    np.fill_diagonal(shares, np.nan)
    close(matrix(plots.coactivation(model, x, batch_size=BATCH)), shares)


def check_plots_of_classes(model, x, expected, tmp_path):
    by_class = np.array([chosen(expected)[each == LABELS].sum(axis=0) for each in range(3)])
    figure = plots.class_by_expert(model, x, LABELS, layer="moe", batch_size=BATCH)
    close(matrix(figure), by_class / by_class.sum(axis=1, keepdims=True))


def check_plots_of_gates_and_slots(model, x, expected, tmp_path):
    figure = plots.task_gates(model, x, batch_size=BATCH)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    close(np.reshape(heights, (2, 3)), expected.gates.mean(axis=0))
    assert matrix(plots.slot_similarity(model)).shape == (2, 2)


def check_plots_of_tokens_and_patches(model, x, expected, tmp_path):
    first = rows(x, 1)
    best = expected.experts[..., 0]
    figure = plots.token_experts(model, first, list("wxyz"), layer="moe", choices=1)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[1:9:2] == list("wxyz") and texts[2:9:2] == [str(each) for each in best[0]]
    shown = {"pictures": np.zeros((N, 4, 4)), "columns": N}
    figure = plots.patch_experts(model, x, layer="moe", batch_size=BATCH, **shown)
    numbers = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert numbers == [str(each) for each in best.ravel()]


def check_report(model, x, expected, tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(page, "picture", lambda figure, caption: f"{caption}\n")  # PNGs take long
        path = keras_moe.report(model, (x, LABELS), tmp_path / "page.html", batch_size=BATCH)
    source = path.read_text(encoding="utf-8")
    assert source.count("Which classes use which expert.") == 3
    assert source.count("Slots that are alike") == source.count("What each task takes") == 1
    assert f">{parameters(model)}<" in source


def check_active_cost(model, x, expected, tmp_path):
    specs = keras.tree.map_structure(lambda each: keras.KerasTensor((1, *each.shape[1:])), x)
    flops = FLOPS - 20 * is_block(model)
    assert layer_flops(model, specs) == flops
    assert active_parameters(model) == parameters(model)
    if isinstance(model, Own) or is_block(model):
        assert active_flops(model, shapes_of(x)) == flops
        with pytest.raises(ValueError, match="`input_shape` must give every size of an example"):
            active_flops(model)
    else:
        assert active_flops(model) == flops


CHECKS = [check for name, check in sorted(globals().items()) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("kind", KINDS)
def test_right_of_any_kind(known, kind, check, tmp_path):
    check(*known(kind), tmp_path)


# === In `fit`, also of what is not built yet ===


UNBUILT = {
    "subclassed": (Own, ONE),
    "subclassed, a dict": (Own, DICT),
    "sequential": (lambda: keras.Sequential([Block(), Heads()]), ONE),
    "nested in a subclassed one": (lambda: Own(functional()), ONE),
}


# One of one input and one of several: what is nested where is Keras's matter.
EVERYWHERE = ("sequential", "subclassed, a dict")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(each, marks=pytest.mark.every_backend) if each in EVERYWHERE else each
        for each in UNBUILT
    ],
)
def test_watched_and_costed_in_fit(kind):
    make, x = UNBUILT[kind]
    model = make()
    model.compile("sgd", "mse")
    cost = tuning.ActiveCost("loss", "min", input_shape=shapes_of(x))
    targets = {task: np.ones((N, 1)) for task in "ab"}
    monitor = callbacks.ExpertMonitor(every=1, alarms=False)
    history = model.fit(x, targets, batch_size=N // 2, verbose=0, callbacks=[monitor, cost]).history
    assert history["active_flops"] == [FLOPS] and history["active_parameters"] == [PARAMETERS]
    shown = {"moe/load_cv", "soft/importance_cv", "tasks/importance_cv"}
    assert shown <= set(history) and all(np.isfinite(history[name]).all() for name in shown)
    assert tuning.ActiveCost(**cost.get_config()).input_shape == cost.input_shape


# === What is wrong is said ===

PICTURES = np.zeros((N, 4, 4))
HELPERS = {
    "record_routing": lambda model, path: keras_moe.record_routing(model).__enter__(),
    "count_routing": lambda model, path: count_routing(model).__enter__(),
    "report": lambda model, path: keras_moe.report(model, TOKENS, path),
    "task_gates": lambda model, path: task_gates(model),
    "active_flops": lambda model, path: active_flops(model, (T, D)),
    "active_parameters": lambda model, path: active_parameters(model),
    "layer_flops": lambda model, path: layer_flops(model, keras.KerasTensor((1, T, D))),
    "count_products": lambda model, path: count_products(model, keras.KerasTensor((1, T, D))),
    "plots.expert_load": lambda model, path: plots.expert_load(model, TOKENS),
    "plots.class_by_expert": lambda model, path: plots.class_by_expert(model, TOKENS, LABELS),
    "plots.coactivation": lambda model, path: plots.coactivation(model, TOKENS),
    "plots.slot_similarity": lambda model, path: plots.slot_similarity(model),
    "plots.task_gates": lambda model, path: plots.task_gates(model, TOKENS),
    "plots.token_experts": lambda model, path: plots.token_experts(model, TOKENS[:1], list("wxyz")),
    "plots.patch_experts": lambda model, path: plots.patch_experts(
        model, TOKENS, pictures=PICTURES
    ),
}
COUNTS = {"active_flops", "active_parameters", "layer_flops", "count_products"}


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize(
    "model", [None, "model.keras", Own, [1], TOKENS, functional], ids=lambda model: str(type(model))
)
def test_no_model_at_all(helper, model, tmp_path):
    message = r"` must be a Keras 3 model or layer. Received: type\((model|layer)\)=<class "
    with pytest.raises(ValueError, match=message):
        HELPERS[helper](model, tmp_path / "page.html")


@pytest.mark.parametrize("helper", HELPERS)
@pytest.mark.parametrize("make", [Own, Block, lambda: keras.Sequential([Block()])])
def test_a_model_that_is_not_built_yet(helper, make, tmp_path):
    message = "call it once|must have been called once|must be built: call the model once"
    with pytest.raises(ValueError, match=message):
        HELPERS[helper](make(), tmp_path / "page.html")


@pytest.mark.parametrize("helper", sorted(set(HELPERS) - COUNTS))
def test_a_model_without_mixtures(helper, tmp_path):
    message = r"`model` must have .* Received: model='dense'"
    model = keras.Sequential([keras.Input((T, D)), keras.layers.Dense(3)], name="dense")
    with pytest.raises(ValueError, match=message):
        HELPERS[helper](model, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())
