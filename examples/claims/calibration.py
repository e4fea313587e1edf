# SPDX-License-Identifier: Apache-2.0
"""Claim: label smoothing keeps a network from being more certain than it is right.

python examples/claims/calibration.py
"""

import time

import matplotlib.pyplot as plt
import torch
from _common import COLORS, SEEDS, write_claim
from _fitting import Classifier, accuracy, few_digits, fit, loss, mean_and_range
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from lightning_optkit.callbacks import LabelSmoothing

SMOOTHINGS, EPOCHS, NOISY = (0.0, 0.05, 0.1, 0.2, 0.4), 30, 0.15


def with_wrong_labels(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in practice, some of the labels are wrong, in training and in test alike."""
    x_train, x_test, y_train, y_test = few_digits(seed, examples=600)
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for y in (y_train, y_test):
        is_wrong = torch.rand(len(y), generator=generator) < NOISY
        noisy.append(torch.where(is_wrong, torch.randint(0, 10, (len(y),), generator=generator), y))
    return x_train, x_test, noisy[0], noisy[1]


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    found: dict[float, dict[str, list[float]]] = {}
    pooled: dict[float, tuple[Tensor, Tensor]] = {}
    for smoothing in track(SMOOTHINGS, description="calibration", transient=True):
        values: dict[str, list[float]] = {key: [] for key in ("ece", "confidence", "accuracy", "loss")}
        confidences, rights = [], []
        for seed in SEEDS:
            data = with_wrong_labels(seed)
            _, x_test, _, y_test = data
            callbacks = [LabelSmoothing(smoothing)] if smoothing else []
            module = fit(Classifier(seed), data, callbacks, epochs=EPOCHS, seed=seed)
            with torch.no_grad():
                probabilities = module(x_test).softmax(dim=1)
            confidence, guess = probabilities.max(dim=1)
            values["ece"].append(float(multiclass_calibration_error(probabilities, y_test, num_classes=10, n_bins=10)))
            values["confidence"].append(float(confidence.mean()))
            values["accuracy"].append(accuracy(module, x_test, y_test))
            values["loss"].append(loss(module, x_test, y_test))
            confidences.append(confidence)
            rights.append((guess == y_test).double())
        found[smoothing], pooled[smoothing] = values, (torch.cat(confidences), torch.cat(rights))

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    left.plot([0, 1], [0, 1], color="gray", linestyle=":", linewidth=1)
    edges = torch.linspace(0, 1, 6)
    for color, (smoothing, (confidence, is_right)) in zip(COLORS, pooled.items(), strict=False):
        bins = torch.bucketize(confidence, edges[1:-1])
        full = [b for b in range(5) if int((bins == b).sum()) >= 15]
        points = [(float(confidence[bins == b].mean()), float(is_right[bins == b].mean())) for b in full]
        left.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=f"smoothing {smoothing:g}")
    left.set_xlabel("confidence")
    left.set_ylabel("share of right answers")
    left.set_xlim(0.1, 1.02)
    left.legend()
    mean = {s: {key: sum(v) / len(v) for key, v in values.items()} for s, values in found.items()}
    for color, key, label in zip(
        COLORS,
        ("confidence", "accuracy", "ece"),
        ("mean confidence", "test accuracy", "expected calibration error"),
        strict=False,
    ):
        right.plot(SMOOTHINGS, [mean[s][key] for s in SMOOTHINGS], color=color, marker="o", markersize=4, label=label)
        for s in SMOOTHINGS:
            right.scatter([s] * len(SEEDS), found[s][key], color=color, s=8, alpha=0.4)
    right.set_xlabel("smoothing")
    right.legend(loc="lower center", ncol=3, bbox_to_anchor=(0.45, 1.0), fontsize=8)
    right.set_ylim(0, 1)
    figure.tight_layout()

    best = min(mean, key=lambda s: mean[s]["ece"])
    worst = max(SMOOTHINGS)
    is_shy = mean[worst]["confidence"] < mean[worst]["accuracy"]
    write_claim(
        "calibration",
        order=72,
        title="Label smoothing and calibration",
        claim="Hard targets drive logits apart without end; smoothed ones let a network say how sure it is.",
        setup=f"600 training and 450 test digits, {NOISY:.0%} of all labels drawn at random, 64-128-128-10 ReLU "
        "network, "
        f"AdamW at 2e-3, {EPOCHS} epochs of batches of 50, three seeds. Expected calibration error by torchmetrics, "
        "10 bins.",
        header=["smoothing", "expected calibration error", "mean confidence", "test accuracy", "test loss"],
        rows=[
            [f"{s:g}", mean_and_range(v["ece"], ".3f"), mean_and_range(v["confidence"], ".3f"),
             mean_and_range(v["accuracy"]), mean_and_range(v["loss"], ".2f")]
            for s, v in found.items()
        ],
        caption="Left: how often an answer of a given confidence is right, three seeds pooled, bins of 15 or "
        "more; below the "
        "dotted line the network is too certain. Right: means over the seeds, and each seed.",
        findings=[
            f"Without smoothing the network is {mean[0.0]['confidence']:.1%} certain and "
            f"{mean[0.0]['accuracy']:.1%} right: "
            f"a calibration error of {mean[0.0]['ece']:.3f}.",
            f"It is lowest at smoothing {best:g}: {mean[best]['ece']:.3f}; at {worst:g} it is {mean[worst]['ece']:.3f}"
            + (", since it is then less certain than right." if is_shy else "."),
            f"The test loss goes from {mean[0.0]['loss']:.2f} to {mean[best]['loss']:.2f}, the accuracy from "
            f"{mean[0.0]['accuracy']:.1%} to {mean[best]['accuracy']:.1%}.",
        ],
        figure=figure,
        numbers={str(s): v for s, v in found.items()},
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
