"""The text study: a whole run, exact resume, a fair split, generation."""

import dataclasses
import json
import math

import keras
import matplotlib.image
import numpy as np
import pytest
import text as example
from common.seeds import verdict
from keras import ops
from language import data
from language.baselines import bits_of_pairs, bits_of_xz
from language.data import load_text, training_batches
from language.generate import characters, generate

PYTHON_SAYS = "the quick brown fox of the standard library jumps over a lazy iterator. "
TINY = (
    *("--seeds", "1", "--epochs", "2", "--steps-per-epoch", "4", "--batch-size", "4"),
    *("--context", "12", "--width", "8", "--depth", "1", "--heads", "2", "--mlp-dim", "16"),
    *("--experts", "2", "--dropout", "0.1"),
    # Keras on JAX would run each step eagerly; elsewhere a graph is enough, and made sooner.
    "--jit-compile" if keras.backend.backend() == "jax" else "--no-jit-compile",
)
OUTPUTS = (
    *(f"{name}.keras" for name in example.KINDS),
    *("learning_curves.png", "experts.png", "figures.json", "samples.txt"),
)


def parsed(*arguments):
    return example.parse_arguments([*TINY, *arguments])


@pytest.fixture(scope="module", autouse=True)
def _short_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "WRITTEN", 20)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def file(folder):
    path = folder / "says.txt"
    path.write_text(PYTHON_SAYS * 40)
    return path


@pytest.fixture(scope="module")
def finished(folder, file):
    """A whole run of all contestants."""
    out = folder / "out"
    assert example.main([*TINY, "--text", str(file), "--out", str(out)]) == 0
    return out


class TestWholeRun:
    def test_writes_everything(self, finished):
        for name in OUTPUTS:
            least = 100 if name == "samples.txt" else 300  # the samples are cut short here
            assert (finished / name).stat().st_size > least, name
        figures = json.loads((finished / "figures.json").read_text())
        assert list(figures) == list(example.KINDS)
        for name, model in figures.items():
            assert model["step_time_ratio"] > 0, name
            assert 0 < model["bits_per_byte"][0] < 8, name  # 8: uniform, where all start
            assert model["curves"][0][-1] == model["bits_per_byte"][0]
            assert model["active_flops"] == pytest.approx(
                figures["dense"]["active_flops"], rel=0.05
            )
        written = (finished / "samples.txt").read_text()
        assert all(f"[{model['title']}]\nThe " in written for model in figures.values())

    def test_saved_model_gives_the_measured_bits(self, finished, file):
        model = keras.saving.load_model(finished / "switch.keras", compile=False)
        x, y = load_text(file, 12).windows(12)
        logits = model.predict(x, batch_size=data.EVALUATION_BATCH, verbose=0).astype("float64")
        log_sum = np.log(np.exp(logits).sum(-1))
        of_next = np.take_along_axis(logits, y[..., None], -1)[..., 0]
        bits = np.mean(log_sum - of_next) / math.log(2)
        figures = json.loads((finished / "figures.json").read_text())
        assert figures["switch"]["bits_per_byte"] == [pytest.approx(bits, rel=1e-4)]

    def test_pictures_are_no_blank_sheets(self, finished):
        for name in ("experts.png", "learning_curves.png"):
            pixels = matplotlib.image.imread(finished / name)
            assert pixels.shape[0] > 80 and pixels.shape[1] > 300
            assert pixels[..., :3].std() > 0.05

    def test_a_finished_run_trains_no_more_and_says_the_same(self, finished, file, monkeypatch):
        before = json.loads((finished / "figures.json").read_text())

        def fit(*_, **__):
            raise AssertionError("it trains again")

        def time_steps(trainers, batch):
            return {name: [1.0] for name in trainers}

        monkeypatch.setattr(keras.Model, "fit", fit)
        monkeypatch.setattr(example, "time_steps", time_steps)
        monkeypatch.setattr(example, "KINDS", {k: example.KINDS[k] for k in ("dense", "top_2")})
        assert example.main([*TINY, "--text", str(file), "--out", str(finished)]) == 0
        after = json.loads((finished / "figures.json").read_text())
        for name in after:
            assert after[name]["curves"] == before[name]["curves"]
        (finished / "figures.json").write_text(json.dumps(before))

    @pytest.mark.parametrize("change", [("--context", "10"), ("--bias-update-rate", "0.5")])
    def test_other_settings_lose_nothing(self, finished, file, change, capsys):
        before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
        arguments = [*TINY, "--text", str(file), "--out", str(finished), *change]
        assert example.main(arguments) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert before == {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}


class TestResume:
    def test_half_a_run_and_the_rest_equal_a_whole_one(self, finished, file, folder):
        # Dropout, and a router whose bias is a state that no optimizer holds.
        options = parsed("--text", str(file), "--out", str(folder / "half"))
        text = load_text(file, options.context)
        example.open_results(options.out, example.settings_of(options, text))
        contestant = example.build("sigmoid_bias", options, seed=0)
        checkpoint = options.out / "checkpoints" / "sigmoid_bias-seed0.npz"

        class Killed(Exception):
            pass

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keras.callbacks.Callback, "on_epoch_begin", _dies_in_second_epoch(Killed))
            with pytest.raises(Killed):
                example.train(contestant, 0, text, options)
        with np.load(checkpoint) as saved:
            assert len(json.loads(str(saved["history"]))["loss"]) == 1
        example.train(example.build("sigmoid_bias", options, seed=7), 0, text, options)
        with (
            np.load(checkpoint) as rest,
            np.load(finished / "checkpoints" / "sigmoid_bias-seed0.npz") as whole,
        ):
            assert rest.files == whole.files
            for part in whole.files:
                np.testing.assert_array_equal(rest[part], whole[part], err_msg=part)


def _dies_in_second_epoch(error):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise error

    return on_epoch_begin


class TestData:
    def test_documentation_of_python_says_nothing_twice(self):
        text = load_text(None, 128)
        assert len(text.train) > 1_000_000
        assert abs(len(text.held_out) / len(text.train) - 0.03) < 0.005
        train, held_out = (
            bytes(part).decode(errors="ignore") for part in (text.train, text.held_out)
        )
        paragraphs = {" ".join(p.split()) for p in train.split("\n\n")}
        held = [" ".join(p.split()) for p in held_out.split("\n\n")[1:]]
        assert len(held) > 100 and not paragraphs & set(held)

    def test_baselines(self, file):
        text = load_text(file, 12)
        assert bits_of_xz(text) < 0.5 < bits_of_pairs(text) < 3  # the same sentence again and again
        rng = np.random.default_rng(0).integers(0, 256, size=40_000).astype("uint8")
        noise = dataclasses.replace(text, train=rng[:-8000], held_out=rng[-8000:])
        assert 7.9 < bits_of_xz(noise) < 8.3 and bits_of_pairs(noise) > 7.9

    def test_held_out_windows_are_the_end(self, file):
        text = load_text(file, 12)
        assert bytes(text.train) + bytes(text.held_out) == file.read_bytes()
        x, y = text.windows(12)
        assert x.shape == y.shape and len(x) % data.EVALUATION_BATCH == 0
        np.testing.assert_array_equal(x.reshape(-1)[1:], y.reshape(-1)[:-1])
        np.testing.assert_array_equal(x.reshape(-1), text.held_out[: x.size])

    def test_batches_depend_on_seed_and_step_alone(self, file):
        text = load_text(file, 12)
        batches = training_batches(text, 4, 12, seed=3)
        straight = [next(batches) for _ in range(5)]
        for step, (x, y) in enumerate(straight):
            again, _ = next(training_batches(text, 4, 12, 3, step))
            np.testing.assert_array_equal(x, again)
            np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
            assert all(bytes(row.astype("uint8")) in bytes(text.train) for row in x)
        other, _ = next(training_batches(text, 4, 12, seed=4))
        assert not np.array_equal(straight[0][0], other)

    def test_bad_files_are_one_line(self, tmp_path, capsys):
        short = tmp_path / "short.txt"
        short.write_text("short")
        for path, message in (
            (tmp_path / "none.txt", "could not be read: No such file"),
            (short, "must have at least 1,540 bytes for windows of 12. Received: short.txt, 5"),
        ):
            out = tmp_path / "out"
            assert example.main([*TINY, "--text", str(path), "--out", str(out)]) == 2
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
            assert not out.exists()


class TestModels:
    def test_equal_work_and_equal_parameters(self):
        options = parsed(
            *("--width", "32", "--mlp-dim", "64", "--experts", "4"),
            *("--depth", "2", "--moe-every", "2"),
        )
        contestants = {name: example.build(name, options, seed=0) for name in example.KINDS}
        dense, *mixtures = contestants.values()
        for mixture in mixtures:
            assert mixture.flops == pytest.approx(dense.flops, rel=0.02)
            assert mixture.active == pytest.approx(dense.active, rel=0.02)
            assert mixture.parameters == pytest.approx(mixtures[0].parameters, rel=0.01)
            assert mixture.parameters > 1.3 * dense.parameters
            names = [part.name for part in mixture.model.layers if hasattr(part, "router")]
            assert names in (["block_1_switch"], ["block_1_moe"])
        router = contestants["sigmoid_bias"].model.get_layer("block_1_moe").router
        assert (router.bias_update_rate, router.num_experts, router.top_k) == (0.01, 8, 2)

    @pytest.mark.parametrize("name", ["switch", "sigmoid_bias"])
    def test_routes_are_causal_and_alone(self, name):
        model = example.build(name, parsed(), seed=0).model
        tokens = np.random.default_rng(0).integers(97, 122, size=(3, 12))
        head = keras.Model(model.input, model.get_layer("decoder_norm").output)
        together = ops.convert_to_numpy(head(tokens))
        alone = ops.convert_to_numpy(head(tokens[:1, :5]))
        np.testing.assert_allclose(alone[0], together[0, :5], atol=1e-4)


class TestGeneration:
    class Successor:
        """The next byte is the last one's successor; looks at nothing behind the last one."""

        def __init__(self):
            self.shapes = set()

        def predict_on_batch(self, tokens):
            self.shapes.add(tokens.shape)
            logits = np.full((*tokens.shape, 256), -50.0, "float32")
            np.put_along_axis(logits, (tokens[..., None] + 1) % 256, 0.0, -1)
            return logits

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_goes_on_beyond_the_context_in_one_shape(self, temperature):
        model = self.Successor()
        assert generate(model, b"abc", 10, context=5, temperature=temperature) == b"defghijklm"
        assert model.shapes == {(1, 5)}

    def test_draws_from_the_softmax(self):
        class Coin:
            def predict_on_batch(self, tokens):
                logits = np.full((*tokens.shape, 256), -1e9, "float32")
                logits[..., ord("a")], logits[..., ord("b")] = math.log(3.0), 0.0
                return logits

        drawn = generate(Coin(), b"a", 2000, context=4, temperature=1.0, seed=1)
        assert drawn.count(b"a") / 2000 == pytest.approx(0.75, abs=0.03)
        colder = generate(Coin(), b"a", 2000, context=4, temperature=0.5, seed=1)
        assert colder.count(b"a") / 2000 == pytest.approx(0.9, abs=0.03)
        assert generate(Coin(), b"a", 5, context=4, temperature=0.0) == b"aaaaa"

    def test_characters_of_bytes(self):
        tokens = np.array(list("a\né€".encode()))
        assert characters(tokens) == ["a", "\n", "é", "…", "€", "…", "…"]
        assert characters(tokens[None, :-1]) == ["a", "\n", "é", "…", "�", "…"]


def test_verdicts_know_that_fewer_bits_are_better():
    words = verdict("a", [2.0, 2.1, 2.0], "b", [3.0, 3.1, 3.0], higher_is_better=False)
    assert words.startswith("a is better than b: -1.0000")
    assert "No difference that 2 seeds" in verdict("a", [1.0, 2.0], "b", [2.0, 1.0])
    assert "One seed" in verdict("a", [1.0], "b", [2.0])
