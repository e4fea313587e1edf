# SPDX-License-Identifier: Apache-2.0
"""Claim: early stopping saves most of the training and loses little; slower criteria save less and find a little more.

python examples/claims/early_stopping.py
"""

import time

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
from _common import COLORS, SEEDS, split, write_claim
from _fitting import Classifier, accuracy, fit, loss, mean_and_range
from lightning.pytorch.callbacks import Callback
from rich.progress import track
from torch import Tensor

from lightning_optkit.callbacks import EarlyStoppingCriterion
from lightning_optkit.data import Standardize

EPOCHS = 200
CRITERIA = {
    "GL 5": EarlyStoppingCriterion("GL", alpha=5.0),
    "GL 20": EarlyStoppingCriterion("GL", alpha=20.0),
    "PQ 0.5": EarlyStoppingCriterion("PQ", alpha=0.5),
    "PQ 2": EarlyStoppingCriterion("PQ", alpha=2.0),
    "UP 2": EarlyStoppingCriterion("UP", successive=2),
    "UP 4": EarlyStoppingCriterion("UP", successive=4),
}


class Trace(Callback):
    """Test accuracy and test loss after every epoch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.seen: list[tuple[float, float]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After Lightning's own order: the weights are those just validated."""
        self.seen.append((accuracy(pl_module, self.x, self.y), loss(pl_module, self.x, self.y)))


def stop_of(criterion: EarlyStoppingCriterion, errors: list[float], training_errors: list[float]) -> int:
    """The epoch after which `criterion` would have stopped."""
    for epoch in range(1, len(errors) + 1):
        criterion.errors, criterion.training_errors = errors[:epoch], training_errors[:epoch]
        if criterion.why_stop() is not None:
            return epoch
    return len(errors)


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    names = [*CRITERIA, "never", "never, last weights"]
    found: dict[str, dict[str, list[float]]] = {n: {key: [] for key in ("epochs", "accuracy", "loss")} for n in names}
    curve: list[float] = []
    for seed in track(SEEDS, description="early stopping", transient=True):
        x_train, x_test, y_train, y_test = split("digits", seed)
        scale = Standardize().fit(x_train[:200])
        x_train, x_test = scale(x_train).float(), scale(x_test).float()
        never, trace = EarlyStoppingCriterion("GL", alpha=1e9, verbose=False), Trace(x_test, y_test)
        # Validated on 450 digits that are neither in training nor in test.
        data = (x_train[:200], x_train[200:650], y_train[:200], y_train[200:650])
        fit(Classifier(seed), data, [never, trace], epochs=EPOCHS, seed=seed, validate=True)
        curve = curve or never.errors
        stops = {name: stop_of(criterion, never.errors, never.training_errors) for name, criterion in CRITERIA.items()}
        for name in names:
            epoch = stops.get(name, EPOCHS)
            best = min(range(epoch), key=never.errors.__getitem__)
            right, cost = trace.seen[EPOCHS - 1 if "last" in name else best]
            for key, value in (("epochs", epoch), ("accuracy", right), ("loss", cost)):
                found[name][key].append(value)

    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.plot(range(1, len(curve) + 1), curve, color="gray", linewidth=1.2)
    for color, name in zip(COLORS, CRITERIA, strict=False):
        epoch = int(found[name]["epochs"][0])
        when = f"epoch {epoch}" if epoch < EPOCHS else "never"
        axis.scatter(epoch, curve[epoch - 1], color=color, zorder=3, label=f"{name}: {when}")
    best = min(range(len(curve)), key=curve.__getitem__)
    axis.scatter(best + 1, curve[best], marker="*", s=120, color="black", zorder=3, label=f"lowest: epoch {best + 1}")
    axis.set_xscale("log")
    axis.set_ylim(min(curve) * 0.9, min(curve) * 2.2)
    axis.set_xlabel("epoch (seed 0)")
    axis.set_ylabel("validation loss")
    axis.legend(ncol=2)
    figure.tight_layout()

    mean = {name: {key: sum(v) / len(v) for key, v in values.items()} for name, values in found.items()}
    whole, last = mean["never"], mean["never, last weights"]
    stopped = {name: m for name, m in mean.items() if m["epochs"] < EPOCHS}
    fastest, slowest = (choose(stopped, key=lambda n: stopped[n]["epochs"]) for choose in (min, max))
    gained = mean[fastest]["loss"] - mean[slowest]["loss"]
    write_claim(
        "early_stopping",
        order=74,
        title="Early stopping saves most of the training",
        claim="The validation error falls, then rises; stopping there is regularization that makes training cheaper. "
        "Prechelt: slower criteria generalize a little better, for much more training.",
        setup="200 training, 450 validation and 450 test digits, 64-128-128-10 ReLU network, AdamW at 2e-3, "
        "batches of 50, "
        f"{EPOCHS} epochs, strips of 5, three seeds; each criterion is asked after every epoch of the same run, "
        "and has "
        "the weights of the lowest validation loss until then.",
        header=["criterion", "epochs", "saved", "test accuracy", "test loss"],
        rows=[
            [name, mean_and_range(v["epochs"], ".0f"), f"{1 - mean[name]['epochs'] / EPOCHS:.0%}",
             mean_and_range(v["accuracy"]), mean_and_range(v["loss"], ".3f")]
            for name, v in found.items()
        ],
        caption="Where each criterion stops on the validation loss of one run; the star is its minimum over all "
        "epochs.",
        findings=[
            f"{fastest} stops first, after {mean[fastest]['epochs']:.0f} of {EPOCHS} epochs: "
            f"{1 - mean[fastest]['epochs'] / EPOCHS:.0%} "
            f"saved, test loss {mean[fastest]['loss']:.3f}; trained to the end and restored it is {whole['loss']:.3f}, "
            f"with the last weights {last['loss']:.3f}.",
            f"The slowest of those that stop, {slowest}, takes {mean[slowest]['epochs']:.0f} epochs and finds "
            + (f"weights better by {gained:.3f}: as claimed." if gained > 0 else "no better weights: what Prechelt "
               "gained by slow criteria does not show here."),
            f"Test accuracy is {last['accuracy']:.1%} with the last weights and {whole['accuracy']:.1%} with "
            "the best: a rising "
            "loss is first of all growing certainty, not growing error.",
        ],
        figure=figure,
        numbers=found,
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
