"""Search for a mixture of experts with keras-tuner, within a budget of active FLOPs.

How many experts, how many per token, how wide? More of each may read images better, and costs more.
The search is over a small Vision Transformer on scikit-learn's 8 x 8 digits, with a mixture in its
last block: `moe_space` draws the arguments of the `MoE` layer, and `ActiveCost` counts the FLOPs of
each model, with k of its E experts. A model above the budget is not trained: its trial has its
FLOPs, and no score. The best one is compared with the default on digits that the search has not
seen.

    KERAS_BACKEND=jax python examples/tune_moe.py

Look at `results/tune`: `trials.png`, accuracy against FLOPs; `report.html`, a page about the best
model's experts. Two searches, both retrained with three seeds: `examples/studies/tune.py`.
"""

from pathlib import Path

import keras
import keras_tuner
import matplotlib.pyplot as plt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from keras_moe import models, report, tuning

BUDGET = 1_500_000  # active FLOPs per image


def build(hp: keras_tuner.HyperParameters) -> keras.Model:
    """Return a compiled ViT; of each tuple the first value is the default."""
    keras.utils.set_random_seed(0)  # trials differ in their hyperparameters alone
    mixture = tuning.moe_space(
        hp,
        "moe",
        num_experts=(8, 4, 16),
        top_k=(2, 1, 4),
        active_hidden_dim=(128, 64, 256),  # the chosen experts' hidden units together
        capacity_factor=None,
    )
    model = models.vit(
        (8, 8, 1),
        num_classes=10,
        patch_size=2,
        width=hp.Choice("width", [32, 24, 48], default=32),
        depth=2,
        num_heads=4,
        mlp_dim=128,
        feed_forward="moe",
        feed_forward_arguments=mixture,
    )
    model.compile(
        keras.optimizers.Adam(hp.Choice("learning_rate", [0.003, 0.001, 0.01], default=0.003)),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


def draw(trials: list, file: Path) -> None:
    """Draw the accuracy of the trials that were trained, by their active FLOPs."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for trial in trials:
        values = trial.hyperparameters.values
        place = trial.metrics.get_best_value("active_flops") / 1e6, trial.score
        axis.plot(*place, "o", color="#0072B2")
        text = f"{values['moe/num_experts']} experts, width {values['width']}"
        axis.annotate(text, place, (5, 5), textcoords="offset points", fontsize=8)
    axis.axvline(BUDGET / 1e6, color="0.4", linestyle=":", label="budget")
    axis.set(xlabel="active FLOPs per image, in millions", ylabel="validation accuracy")
    axis.legend(frameon=False)
    figure.savefig(file, dpi=120)


def main(trials: int = 8, epochs: int = 10, folder: Path = Path("results/tune")) -> dict:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    x, x_test, y, y_test = train_test_split(images, labels, test_size=360, random_state=0)
    cost = tuning.ActiveCost("val_accuracy", "max", max_flops=BUDGET)
    tuner = keras_tuner.RandomSearch(
        cost.capped(build),
        objective=cost.objective,
        max_trials=trials,
        max_consecutive_failed_trials=trials,  # those above the budget count as failed
        seed=8,
        directory=folder,
        project_name="search",
        overwrite=True,
    )
    fit = {"epochs": epochs, "batch_size": 64, "verbose": 0}
    tuner.search(x[360:], y[360:], validation_data=(x[:360], y[:360]), callbacks=[cost], **fit)

    trained = [trial for trial in tuner.oracle.trials.values() if trial.status == "COMPLETED"]
    for trial in tuner.oracle.trials.values():
        score = f"{trial.score:.4f}" if trial in trained else "above the budget"
        print(f"{score:<17}{trial.hyperparameters.values}")
    draw(trained, folder / "trials.png")

    best, accuracy = tuner.get_best_hyperparameters()[0], {}
    for name, hp in (("default", keras_tuner.HyperParameters()), ("best of the search", best)):
        model = build(hp)
        model.fit(x, y, **fit)
        accuracy[name] = model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    print("Accuracy on the test digits (one training each):", accuracy)
    page = report(model, (x_test, y_test), folder / "report.html", title="The best of the search")
    print("The page:", page)
    return accuracy


if __name__ == "__main__":
    main()
