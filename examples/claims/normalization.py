# SPDX-License-Identifier: Apache-2.0
"""Claim: normalization layers widen the range of learning rates at which a network trains.

python examples/claims/normalization.py
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from _common import COLORS, SEEDS, SideBySide, split, train, write_claim
from torch import nn

from lightning_optkit.data import Standardize
from lightning_optkit.init import he, initialize

DEPTH, WIDTH, BATCH, STEPS, EVERY, WANTED = 8, 64, 64, 300, 10, 0.9
RATES = tuple(10 ** (exponent / 2) for exponent in range(-8, 5))
NORMS = {"none": None, "BatchNorm": nn.BatchNorm1d, "LayerNorm": nn.LayerNorm}


def network(norm: type[nn.Module] | None, seed: int) -> nn.Sequential:
    sizes, layers = [64, *[WIDTH] * (DEPTH - 1), 10], []
    for i in range(DEPTH):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if i < DEPTH - 1:
            layers += [*([norm(WIDTH)] if norm else []), nn.ReLU()]
    net = nn.Sequential(*layers)
    initialize(net, he, generator=torch.Generator().manual_seed(seed))
    return net


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    data = []
    for seed in SEEDS:
        x_train, x_test, y_train, y_test = split("digits", seed)
        scale = Standardize().fit(x_train)
        data.append((scale(x_train).float(), scale(x_test).float(), y_train, y_test))
    figure, axis = plt.subplots(figsize=(6.8, 3.8))
    rows, widths = [], {}
    for color, (name, norm) in zip(COLORS, NORMS.items(), strict=False):
        nets = SideBySide([network(norm, seed) for _ in RATES for seed in SEEDS])
        rates = torch.tensor(RATES).repeat_interleave(len(SEEDS))
        accuracies, _ = train(
            nets, rates, data * len(RATES), steps=STEPS, batch_size=BATCH, every=EVERY, what=f"norm: {name}"
        )
        final = accuracies[-1].view(len(RATES), len(SEEDS))
        axis.fill_between(RATES, final.min(dim=1).values, final.max(dim=1).values, color=color, alpha=0.15, linewidth=0)
        axis.plot(RATES, final.median(dim=1).values, color=color, marker="o", markersize=4, label=name)
        trains = [rate for rate, worst in zip(RATES, final.min(dim=1).values, strict=True) if worst >= WANTED]
        widths[name] = decades(trains)
        best = int(final.median(dim=1).values.argmax())
        rows.append([
            name, f"{min(trains):.2g} to {max(trains):.2g}" if trains else "none", f"{widths[name]:.1f}",
            f"{RATES[best]:.2g}", ", ".join(f"{float(a):.1%}" for a in final[best]),
        ])  # fmt: skip
    axis.axhline(WANTED, color="gray", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel(f"test accuracy after {STEPS} steps")
    axis.set_ylim(0, 1.02)
    axis.legend(title="normalization", loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    write_claim(
        "normalization",
        order=3,
        title="Normalization: which learning rates train",
        claim="A normalized layer's output does not depend on the scale of its weights, so larger rates do no harm: "
        "normalization layers widen the range of rates that train (NNDL 7.5).",
        setup=f"Digits (standardized), {DEPTH} fully connected layers of {WIDTH} with ReLU, He, SGD with momentum 0.9, "
        f"batches of {BATCH}, {STEPS} steps, {len(RATES)} rates, two per decade; seeds 0, 1, 2 (weights and split).",
        header=["normalization", f"rates with {WANTED:.0%} or more at all seeds", "decades", "best rate",
                "accuracy there, by seed"],
        rows=rows,
        caption="Lines: median of three seeds; bands: lowest and highest. A network that diverged predicts one class.",
        findings=findings(widths),
        figure=figure,
        started=started,
    )  # fmt: skip


def decades(rates: list[float]) -> float:
    """Width of the range in powers of ten; one rate alone is 0 wide."""
    return math.log10(max(rates) / min(rates)) if rates else 0.0


def findings(widths: dict[str, float]) -> list[str]:
    """What the numbers say, for and against."""
    said = []
    for name in ("BatchNorm", "LayerNorm"):
        verdict = "as claimed" if widths[name] > widths["none"] else "the claim does not hold here"
        wide, plain = f"{widths[name]:.1f}", f"{widths['none']:.1f}"
        said.append(f"{name} trains over {wide} decades of rates, without it {plain}: {verdict}.")
    return said


if __name__ == "__main__":
    main()
