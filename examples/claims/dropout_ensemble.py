# SPDX-License-Identifier: Apache-2.0
"""Claim: dropout trains an ensemble of thinned networks, and the whole network stands for its average.

python examples/claims/dropout_ensemble.py
"""

import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _common import COLORS, SEEDS, write_claim
from _fitting import Classifier, accuracy, few_digits, fit, loss, mean_and_range
from torch import Tensor

EPOCHS, SIZES, MASKS = 100, (1, 2, 5, 10, 20, 50, 100), 100


@torch.no_grad()
def thinned(module: Classifier, x: Tensor) -> Tensor:
    """Probabilities of MASKS networks with their own dropout masks, (MASKS, N, C)."""
    module.train()
    probabilities = torch.stack([module(x).softmax(dim=1) for _ in range(MASKS)])
    module.eval()
    return probabilities


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    kinds = ("without dropout", "one thinned network", f"average of {MASKS} thinned", "whole network, as trained")
    found: dict[str, dict[str, list[float]]] = {kind: {"accuracy": [], "loss": []} for kind in kinds}
    curves = []
    for seed in SEEDS:
        data = few_digits(seed)
        _, x_test, _, y_test = data
        plain = fit(Classifier(seed), data, [], epochs=EPOCHS, seed=seed)
        dropped = fit(Classifier(seed, dropout=0.5), data, [], epochs=EPOCHS, seed=seed)
        for kind, module in ((kinds[0], plain), (kinds[3], dropped)):
            found[kind]["accuracy"].append(accuracy(module, x_test, y_test))
            found[kind]["loss"].append(loss(module, x_test, y_test))
        torch.manual_seed(seed)
        probabilities = thinned(dropped, x_test)
        single = (probabilities.argmax(dim=2) == y_test).double().mean()
        found[kinds[1]]["accuracy"].append(float(single))
        losses = [float(F.nll_loss(p.clamp(min=1e-7).log(), y_test)) for p in probabilities]
        found[kinds[1]]["loss"].append(sum(losses) / MASKS)
        curve = []
        for size in SIZES:
            groups = [probabilities[start : start + size].mean(dim=0) for start in range(0, MASKS - size + 1, size)]
            curve.append(sum(float((g.argmax(dim=1) == y_test).double().mean()) for g in groups) / len(groups))
        curves.append(curve)
        average = probabilities.mean(dim=0)
        found[kinds[2]]["accuracy"].append(float((average.argmax(dim=1) == y_test).double().mean()))
        found[kinds[2]]["loss"].append(float(F.nll_loss(average.clamp(min=1e-7).log(), y_test)))

    mean = {kind: {key: sum(v) / len(v) for key, v in values.items()} for kind, values in found.items()}
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    for curve in curves:
        axis.plot(SIZES, curve, color=COLORS[0], alpha=0.3, linewidth=1)
    axis.plot(
        SIZES,
        [sum(c) / len(c) for c in zip(*curves, strict=True)],
        color=COLORS[0],
        marker="o",
        label="average of thinned networks",
    )
    axis.axhline(mean[kinds[3]]["accuracy"], color=COLORS[1], linestyle="--", label="the whole network, one pass")
    axis.axhline(mean[kinds[0]]["accuracy"], color="gray", linestyle=":", label="trained without dropout")
    axis.set_xscale("log")
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    axis.set_xlabel("thinned networks in the average")
    axis.set_ylabel("test accuracy")
    axis.legend()
    figure.tight_layout()
    one, many, whole, plain_mean = (mean[kind] for kind in (kinds[1], kinds[2], kinds[3], kinds[0]))
    write_claim(
        "dropout_ensemble",
        order=73,
        title="Dropout as an ensemble",
        claim="Each step of dropout trains one of exponentially many thinned networks that share weights; using "
        "the whole "
        "network at test time approximates their average.",
        setup="200 training and 450 test digits, 64-128-128-10 ReLU network, dropout 0.5 on both hidden "
        "layers, AdamW at "
        f"2e-3, {EPOCHS} epochs of batches of 50, three seeds.",
        header=["network", "test accuracy", "test loss"],
        rows=[[kind, mean_and_range(v["accuracy"]), mean_and_range(v["loss"], ".3f")] for kind, v in found.items()],
        caption="Test accuracy of averages of thinned networks; thin lines are seeds, the mean is thick.",
        findings=[
            f"One thinned network is {one['accuracy']:.1%} right, the average of {MASKS} {many['accuracy']:.1%}.",
            f"The whole network in one pass: {whole['accuracy']:.1%}, "
            f"{abs(whole['accuracy'] - many['accuracy']) * 100:.1f} "
            f"points from the average of {MASKS} passes; test losses {whole['loss']:.3f} and {many['loss']:.3f}.",
            f"Without dropout: {plain_mean['accuracy']:.1%}, test loss {plain_mean['loss']:.3f}.",
        ],
        figure=figure,
        numbers=found | {"sizes": list(SIZES), "curves": curves},
        started=started,
    )


if __name__ == "__main__":
    main()
