# SPDX-License-Identifier: Apache-2.0
"""Claim: regularization closes the gap between training and test error.

python examples/claims/regularizers.py
"""

import time

import matplotlib.pyplot as plt
import torch
from _common import COLORS, SEEDS, write_claim
from _fitting import Classifier, Data, accuracy, few_digits, fit, loss, mean_and_range
from rich.progress import track

from lightning_optkit.callbacks import (
    SAM,
    ActivationRegularization,
    Augment,
    DropoutSchedule,
    EarlyStoppingCriterion,
    ElasticNet,
    GradientNoise,
    LabelSmoothing,
    MaxNorm,
    RDrop,
)
from lightning_optkit.data import Mixup
from lightning_optkit.schedules import linear

EPOCHS, NOISY = 60, 0.2
# name -> callbacks, arguments of the network
METHODS = {
    "none": (lambda: [], {}),
    "L2 (0.5)": (lambda: [ElasticNet(l2=0.5, verbose=False)], {}),
    "L1 (0.01)": (lambda: [ElasticNet(l1=0.01, verbose=False)], {}),
    "dropout (0.5)": (lambda: [], dict(dropout=0.5)),
    "dropout growing to 0.5": (lambda: [DropoutSchedule(linear(0.0, 1.0), verbose=False)], dict(dropout=0.5)),
    "R-Drop (1), dropout (0.5)": (lambda: [RDrop(1.0)], dict(dropout=0.5)),
    "label smoothing (0.1)": (lambda: [LabelSmoothing(0.1)], {}),
    "Mixup (0.4)": (lambda: [Augment(Mixup(0.4))], {}),
    "small activations (2)": (lambda: [ActivationRegularization("net.[14]", alpha=2.0, beta=0.0)], {}),
    "SAM (0.5)": (lambda: [SAM(0.5)], {}),
    "ASAM (2)": (lambda: [SAM(2.0, adaptive=True)], {}),
    "gradient noise (0.01)": (lambda: [GradientNoise(0.01)], {}),
    "max norm (0.5)": (lambda: [MaxNorm(0.5)], {}),
    "early stopping (GL 5)": (lambda: [EarlyStoppingCriterion("GL", alpha=5.0, verbose=False)], {}),
}


def with_wrong_labels(seed: int) -> Data:
    """Something to learn by heart that is not worth it: a fifth of the training labels is drawn at random."""
    x_train, x_test, y_train, y_test = few_digits(seed)
    generator = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(len(y_train), generator=generator) < NOISY
    drawn = torch.randint(0, 10, (len(y_train),), generator=generator)
    return x_train, x_test, torch.where(is_wrong, drawn, y_train), y_test


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    data = [with_wrong_labels(seed) for seed in SEEDS]
    found: dict[str, dict[str, list[float]]] = {}
    for name, (callbacks, arguments) in track(METHODS.items(), description="regularizers", transient=True):
        values: dict[str, list[float]] = {key: [] for key in ("train", "test", "train loss", "test loss")}
        for seed, (x_train, x_test, y_train, y_test) in zip(SEEDS, data, strict=True):
            module = Classifier(seed, **arguments)
            is_watched = name.startswith("early")
            fit(module, data[seed], callbacks(), epochs=EPOCHS, seed=seed, validate=is_watched)
            values["train"].append(accuracy(module, x_train, y_train))
            values["test"].append(accuracy(module, x_test, y_test))
            values["train loss"].append(loss(module, x_train, y_train))
            values["test loss"].append(loss(module, x_test, y_test))
        found[name] = values

    mean = {name: {key: sum(v) / len(v) for key, v in values.items()} for name, values in found.items()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    places = range(len(found))
    for place, name in zip(places, found, strict=True):
        test, train = mean[name]["test loss"], mean[name]["train loss"]
        left.plot([train, test], [place, place], color="lightgray", linewidth=3, zorder=1)
        left.scatter(train, place, color=COLORS[0], zorder=2)
        left.scatter(test, place, color=COLORS[1], zorder=2)
        right.scatter(found[name]["test"], [place] * len(SEEDS), color=COLORS[1], s=12, alpha=0.5)
        right.scatter(mean[name]["test"], place, color=COLORS[1], marker="|", s=180)
    left.scatter([], [], color=COLORS[0], label="training")
    left.scatter([], [], color=COLORS[1], label="test")
    left.legend(loc="lower center", ncol=2, bbox_to_anchor=(0.5, 1.0))
    left.set_yticks(list(places), list(found))
    left.invert_yaxis()
    left.set_xlabel("cross entropy, mean of three seeds; the bar is the gap")
    right.set_xlabel("test accuracy, each seed and their mean")
    right.axvline(mean["none"]["test"], color="gray", linestyle=":", linewidth=0.8)
    figure.tight_layout()

    gap = {name: m["test loss"] - m["train loss"] for name, m in mean.items()}
    closed = [name for name in gap if gap[name] < gap["none"]]
    better = [name for name in mean if mean[name]["test"] > mean["none"]["test"]]
    rest = [name for name in mean if name != "none" and name not in better]
    best = max(mean, key=lambda name: mean[name]["test"])
    write_claim(
        "regularizers",
        order=70,
        title="Regularization closes the gap between training and test",
        claim="A network that is large for its data learns it by heart; each regularizer gives up some of the training "
        "error for a lower test error.",
        setup=f"200 training digits (scikit-learn), {NOISY:.0%} of their labels drawn at random, 450 clean test "
        "digits, 64-128-128-10 ReLU network, AdamW at 2e-3 "
        "without decay, "
        f"batches of 50, {EPOCHS} epochs, seeds {', '.join(map(str, SEEDS))}; each method is one callback on the same "
        "module. Strengths were chosen by hand, once; those of SAM and ASAM a second time, since the first changed "
        "nothing. Early stopping looks at the test set, which flatters it.",
        header=["method", "training accuracy", "test accuracy", "training loss", "test loss", "gap of the losses"],
        rows=[
            [
                name,
                mean_and_range(v["train"]),
                mean_and_range(v["test"]),
                f"{mean[name]['train loss']:.3f}",
                f"{mean[name]['test loss']:.3f}",
                f"{gap[name]:.3f}",
            ]
            for name, v in found.items()
        ],
        caption="Left: training and test loss. Right: test accuracy; dotted, without regularization.",
        findings=[
            f"The gap of the losses is {gap['none']:.3f} without regularization; it is smaller with {len(closed)} of "
            f"{len(gap) - 1} methods: {'; '.join(closed)}.",
            f"Mean test accuracy is higher than without ({mean['none']['test']:.1%}) with: "
            f"{'; '.join(better) or 'none'}. "
            f"Best: {best}, {mean[best]['test']:.1%}.",
            f"It is not with: {'; '.join(rest) or 'none'}; a small gap is not yet a good model.",
            "With 450 test digits one standard error of an accuracy is about two points.",
        ],
        figure=figure,
        numbers=found,
        started=started,
    )


if __name__ == "__main__":
    main()
