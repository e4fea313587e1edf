# SPDX-License-Identifier: Apache-2.0
"""Claim: L2 in the loss and weight decay are the same under SGD and different under Adam.

python examples/claims/weight_decay.py
"""

import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _common import COLORS, SEEDS, write_claim
from _fitting import Classifier, accuracy, few_digits, mean_and_range
from rich.progress import track
from torch import Tensor

from lightning_optkit.optimizers import SGD, Adam, AdamW
from lightning_optkit.regularization import l2_penalty, weights_of

STEPS, DECAY = 400, 0.05
# name -> optimizer, its weight decay, L2 in the loss
WAYS = {
    "SGD, L2 in the loss": (lambda p: SGD(p, lr=0.05), DECAY),
    "SGD, weight_decay": (lambda p: SGD(p, lr=0.05, weight_decay=DECAY), 0.0),
    "Adam, L2 in the loss": (lambda p: Adam(p, lr=2e-3), DECAY),
    "Adam, weight_decay": (lambda p: Adam(p, lr=2e-3, weight_decay=DECAY), 0.0),
    "AdamW, weight_decay": (lambda p: AdamW(p, lr=2e-3, weight_decay=DECAY), 0.0),
}


def run(name: str, seed: int) -> tuple[Tensor, Tensor, float]:
    """Weights of the first layer, mean square of the gradient of each, and the test accuracy."""
    make, in_the_loss = WAYS[name]
    x_train, x_test, y_train, y_test = few_digits(seed)
    x_train, x_test = x_train.double(), x_test.double()  # rounding would grow over the steps
    module = Classifier(seed).double()
    weights = list(weights_of(module).values())
    biases = [p for p in module.parameters() if p.dim() == 1]
    optimizer = make([{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    generator = torch.Generator().manual_seed(seed)
    first, squares = module.net[0].weight, torch.zeros_like(module.net[0].weight)
    for _ in range(STEPS):
        rows = torch.randint(0, len(x_train), (50,), generator=generator)
        loss = F.cross_entropy(module(x_train[rows]), y_train[rows])
        squares += torch.autograd.grad(loss, first, retain_graph=True)[0] ** 2 / STEPS
        if in_the_loss:
            loss = loss + l2_penalty(weights, in_the_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first.detach(), squares.sqrt(), accuracy(module.eval(), x_test, y_test)


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, tuple[Tensor, Tensor]] = {}
    weights: dict[tuple[str, int], Tensor] = {}
    for name in track(WAYS, description="weight decay", transient=True):
        values: dict[str, list[float]] = {"ratio": [], "norm": [], "accuracy": []}
        for seed in SEEDS:
            weight, gradient, right = run(name, seed)
            weights[name, seed] = weight
            sizes = gradient.flatten().argsort()
            low, high = (
                weight.flatten()[part].abs().mean() for part in (sizes[: len(sizes) // 4], sizes[-(len(sizes) // 4) :])
            )
            values["ratio"].append(float(high / low))
            values["norm"].append(float(weight.norm()))
            values["accuracy"].append(right)
            shown.setdefault(name, (gradient.flatten(), weight.flatten().abs()))
        found[name] = values

    def apart(one: str, other: str) -> float:
        return max(float((weights[one, seed] - weights[other, seed]).abs().max()) for seed in SEEDS)

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), sharey=True)
    for axis, color, name in zip(
        axes, COLORS, ("SGD, weight_decay", "Adam, weight_decay", "AdamW, weight_decay"), strict=False
    ):
        gradient, size = shown[name]
        axis.scatter(gradient, size, s=2, alpha=0.25, color=color, linewidths=0, rasterized=True)
        order = gradient.argsort()
        chunks = list(zip(gradient[order].chunk(12), size[order].chunk(12), strict=True))
        axis.plot(
            [float(g.median()) for g, _ in chunks],
            [float(s.median()) for _, s in chunks],
            color="black",
            marker="o",
            markersize=3,
        )
        axis.set_xscale("log")
        axis.set_xlim(1e-5, None)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("root mean square of the gradient")
    axes[0].set_ylabel("|w| after training")
    axes[0].set_ylim(0, 0.3)
    figure.tight_layout()

    mean = {name: {key: sum(v) / len(v) for key, v in values.items()} for name, values in found.items()}
    write_claim(
        "weight_decay",
        order=75,
        title="L2 in the loss and weight decay",
        claim="Under SGD an L2 term in the loss is weight decay. Adam divides its gradient by the size of all "
        "gradients, so "
        "that weights with large gradients decay less; AdamW decays all alike.",
        setup=f"200 training and 450 test digits, 64-128-128-10 ReLU network, {STEPS} steps of 50, decay "
        f"{DECAY} on the "
        "weights only, SGD at 0.05, Adam and AdamW at 2e-3, three seeds, double precision.",
        header=["optimizer", "norm of the first layer", "|w|, quarter of largest gradients / of smallest",
                "test accuracy"],
        rows=[
            [name, mean_and_range(v["norm"], ".2f"), mean_and_range(v["ratio"], ".2f"), mean_and_range(v["accuracy"])]
            for name, v in found.items()
        ],
        caption="Weights of the first layer against the size of their gradients, seed 0; black, medians of twelfths.",
        findings=[
            f"SGD: weights with L2 in the loss and with weight_decay differ by at most "
            f"{apart('SGD, L2 in the loss', 'SGD, weight_decay'):.0e}, rounding in double precision; Adam's by "
            f"{apart('Adam, L2 in the loss', 'Adam, weight_decay'):.0e}.",
            f"Adam's and AdamW's differ by up to {apart('Adam, weight_decay', 'AdamW, weight_decay'):.2f} at "
            "the same decay.",
            "Where gradients are large, weights stay larger by a factor of "
            f"{mean['Adam, weight_decay']['ratio']:.2f} under "
            f"Adam and {mean['AdamW, weight_decay']['ratio']:.2f} under AdamW.",
            f"The same number means more under Adam here: norm {mean['Adam, weight_decay']['norm']:.2f} against "
            f"{mean['AdamW, weight_decay']['norm']:.2f} under AdamW, since small gradients are divided by little.",
        ],
        figure=figure,
        numbers=found,
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
