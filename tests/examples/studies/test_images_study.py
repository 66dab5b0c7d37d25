"""The image study: whole runs, exact resume after a kill, clear errors, true pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import images as example
import keras
import matplotlib.image
import numpy as np
import pytest
from common import resume
from vision.augmentation import RandomShiftAndFlip
from vision.data import RECIPES, DataError, load_images, training_batches
from vision.routing import measure_use

import keras_moe

STUDIES = Path(__file__).parents[3] / "examples" / "studies"
# What the script does, less the dense model.
TRAIN_MIXTURE = """
import sys
import images as example

options = example.parse_arguments(sys.argv[1:])
images = example.load_images(options.dataset)
example.complete(options, images)
example.open_results(options.out, example.settings_of(options))
example.train(example.build("mixture", images, options, seed=0), 0, images, options)
"""
TINY = (
    *("--dataset", "digits", "--seeds", "1", "--epochs", "8", "--steps-per-epoch", "5"),
    *("--batch-size", "16", "--width", "8", "--depth", "2", "--heads", "2", "--mlp-dim", "16"),
    *("--patch-size", "4", "--dropout", "0.1"),
)
OUTPUTS = ("dense.keras", "mixture.keras", "learning_curves.png", "experts.png", "figures.json")


@pytest.fixture(scope="module")
def images():
    return load_images("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def soft(folder):
    """A whole run with Soft MoE."""
    out = folder / "soft"
    assert example.main([*TINY, "--ffn", "soft_moe", "--epochs", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def mixture(images):
    """A mixture with all that is drawn at random: dropout, shifts, the router's jitter."""
    options = parsed("--ffn", "switch")
    example.complete(options, images)
    return example.build("mixture", images, options, seed=0)


def train_mixture(mixture, images, out: Path) -> tuple[dict, example.Run]:
    """Train in a folder; return the last checkpoint, and the run."""
    options = parsed("--ffn", "switch", "--out", str(out))
    example.complete(options, images)
    example.open_results(out, example.settings_of(options))
    run = example.train(mixture, 0, images, options)
    with np.load(out / "checkpoints" / "mixture-seed0.npz") as saved:
        return dict(saved), run


@pytest.fixture(scope="module")
def whole(folder, mixture, images):
    """A training that nobody interrupts."""
    return train_mixture(mixture, images, folder / "whole")


@pytest.fixture(scope="module")
def resumed(folder, mixture, images):
    """The same training, killed after its first checkpoint and started again."""
    out = folder / "resumed"
    checkpoint = out / "checkpoints" / "mixture-seed0.npz"
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_MIXTURE, *TINY, "--ffn", "switch", "--out", str(out)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(STUDIES), str(Path(keras_moe.__file__).parents[1])]),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not checkpoint.exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with np.load(checkpoint) as saved:
        assert 1 <= len(json.loads(str(saved["history"]))["loss"]) < 8
    return train_mixture(mixture, images, out)


def parsed(*arguments):
    return example.parse_arguments([*TINY, *arguments])


class TestWholeRun:
    def test_writes_everything(self, soft):
        assert all((soft / name).stat().st_size > 500 for name in OUTPUTS)
        figures = json.loads((soft / "figures.json").read_text())
        assert figures["step_time_ratio"] > 0
        for model in figures["models"].values():
            assert 0 <= model["test_accuracy"][0] <= 1

    @pytest.mark.parametrize("name", ["dense", "mixture"])
    def test_saved_model_gives_the_measured_accuracy(self, soft, images, name):
        model = keras.saving.load_model(soft / f"{name}.keras")
        predicted = model.predict(images.test[0].astype("float32"), batch_size=250, verbose=0)
        accuracy = np.mean(predicted.argmax(-1) == images.test[1])
        figures = json.loads((soft / "figures.json").read_text())
        assert figures["models"][name]["test_accuracy"] == [pytest.approx(accuracy, abs=1e-9)]

    def test_pictures_are_no_blank_sheets(self, soft):
        for name in ("experts.png", "learning_curves.png"):
            pixels = matplotlib.image.imread(soft / name)
            assert pixels.shape[0] > 300 and pixels.shape[1] > 600
            assert pixels[..., :3].std() > 0.05


class TestResume:
    def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(self, whole, resumed):
        (straight, run), (broken, run_again) = whole, resumed
        assert straight.keys() == broken.keys()
        for part in straight:
            np.testing.assert_array_equal(straight[part], broken[part], err_msg=part)
        assert run.history == run_again.history
        np.testing.assert_array_equal(run.predictions, run_again.predictions)

    def test_random_states_are_part_of_the_state(self, mixture):
        variables = resume._variables(mixture.trainer)
        states = [v.path for v in variables if "seed_generator" in v.path]
        assert len(states) > 3, states  # augmentation, dropouts, the router's jitter

    def test_batches_depend_on_seed_and_step_alone(self, images):
        batches = training_batches(images, 64, seed=3)
        straight = [next(batches) for _ in range(40)]
        for first_step in (7, 16, 33):
            x, y = next(training_batches(images, 64, 3, first_step))
            np.testing.assert_array_equal(x, straight[first_step][0])
            np.testing.assert_array_equal(y, straight[first_step][1])
        assert not np.array_equal(straight[0][1], next(training_batches(images, 64, 4))[1])

    def test_other_settings_lose_nothing(self, images, tmp_path, capsys):
        out = tmp_path / "out"
        options = parsed("--out", str(out))
        example.complete(options, images)
        resume.open_results(out, example.settings_of(options))
        for name in ("checkpoints/dense-seed0.npz", "dense.keras", "figures.json"):
            (out / name).write_bytes(b"an hour of work")
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        assert example.main([*TINY, "--epochs", "3", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert "epochs was 8 and is 3" in error
        assert "--overwrite" in error and "Nothing was changed" in error
        assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def test_foreign_folder_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(resume.ResultsError, match=r"no settings\.json.*--out"):
                resume.open_results(tmp_path, {"epochs": 2}, overwrite)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]

    def test_overwrite_starts_anew(self, tmp_path):
        resume.open_results(tmp_path / "out", {"epochs": 2})
        checkpoint = tmp_path / "out" / "checkpoints" / "dense-seed0.npz"
        checkpoint.write_bytes(b"old")
        resume.open_results(tmp_path / "out", {"epochs": 2})
        assert checkpoint.exists()
        resume.open_results(tmp_path / "out", {"epochs": 3}, overwrite=True)
        assert not checkpoint.exists()
        assert json.loads((tmp_path / "out" / "settings.json").read_text()) == {"epochs": 3}


class TestData:
    def test_parts_are_apart_and_divide_into_batches(self, images):
        parts = [part[0].reshape(len(part[0]), -1) for part in (images.validation, images.test)]
        assert [len(part) for part in parts] == [250, 500]
        assert len(images.train[0]) == 1797 - 750
        rows = [{image.tobytes() for image in part} for part in parts]
        training = {image.tobytes() for image in images.train[0].reshape(1047, -1)}
        assert not rows[0] & rows[1] and not training & (rows[0] | rows[1])

    def test_failed_download_falls_back_to_digits_and_says_so(self, monkeypatch):
        def fail():
            raise Exception("URL fetch failure on https://example.org: None -- no route to host")

        monkeypatch.setattr(keras.datasets.fashion_mnist, "load_data", fail)
        said = []
        images = load_images("fashion_mnist", said.append)
        assert images.name == "digits"
        assert "fashion_mnist could not be loaded: Exception: URL fetch failure" in said[0]
        assert "Going on with digits" in said[0] and "KERAS_HOME" in said[0]

    def test_missing_scikit_learn_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match=r'pip install "keras-moe\[examples\]"'):
            load_images("digits")

    @pytest.mark.parametrize(("option", "known"), [("--dataset", "cifar10"), ("--ffn", "switch")])
    def test_unknown_names_are_refused_with_the_known_ones(self, option, known, capsys):
        with pytest.raises(SystemExit) as stopped:
            example.main([option, "imagenet"])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert "invalid choice: 'imagenet'" in error and known in error

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--patch-size", "3"], "must divide into whole patches of 3 x 3"),
            (["--batch-size", "2000"], "must be at most 1047"),
            (["--heads", "3"], "must be a multiple of `num_heads`"),
        ],
    )
    def test_wrong_sizes_are_one_line(self, arguments, message, capsys, tmp_path):
        assert example.main([*TINY, *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()


class TestModels:
    @pytest.mark.parametrize("ffn", example.FEED_FORWARDS)
    def test_equal_active_flops(self, images, ffn):
        options = parsed("--ffn", ffn)
        options.width, options.mlp_dim = 32, 64
        example.complete(options, images)
        dense, mixture = (
            example.active_flops(make(images, options))
            for make in (example.build_dense, example.build_mixture)
        )
        assert dense == pytest.approx(mixture, rel=0.02)

    @pytest.mark.parametrize("ffn", example.FEED_FORWARDS)
    def test_use_of_experts_is_theirs(self, images, ffn):
        options = parsed("--ffn", ffn)
        example.complete(options, images)
        use = measure_use(example.build("mixture", images, options, 0).classifier, images, 250)
        patches = (8 // 4) ** 2
        columns = 16 if ffn == "soft_moe" else 8
        assert use.weights.shape == (6, patches, columns)
        if ffn == "soft_moe":
            np.testing.assert_allclose(use.weights.sum(1), 1, rtol=1e-5)
        else:
            chosen = (use.weights > 0).sum(-1)
            assert (chosen == {"moe": 2, "switch": 1}[ffn]).mean() > 0.9  # the rest found no room
            assert use.weights.max() <= 1
        labels = images.test[1][use.images]
        assert len(set(labels.tolist())) == 6

    def test_shift_and_flip_move_whole_pixels_in_training_only(self):
        pixels = np.arange(32 * 6 * 6, dtype="float32").reshape(32, 6, 6, 1)
        keras.utils.set_random_seed(0)
        layer = RandomShiftAndFlip(1, flip=True)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer(pixels)), pixels)
        moved = keras.ops.convert_to_numpy(layer(pixels, training=True))[..., 0]
        found = set()
        for before, after in zip(pixels[..., 0], moved, strict=True):
            padded = np.pad(before, 1, mode="edge")
            candidates = {
                (down, right, flip): padded[down : down + 6, right : right + 6][:, ::flip]
                for down in range(3)
                for right in range(3)
                for flip in (1, -1)
            }
            fits = [key for key, image in candidates.items() if np.array_equal(image, after)]
            assert len(fits) == 1
            found.add(fits[0])
        assert len(found) > 9

    def test_every_recipe_suits_its_dataset(self):
        assert all(recipe.validation % 250 == 0 for recipe in RECIPES.values())
        assert not RECIPES["digits"].flips and not RECIPES["mnist"].flips
