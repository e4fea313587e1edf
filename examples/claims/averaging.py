# SPDX-License-Identifier: Apache-2.0
"""Claim: an average of the weights is a better network than the weights themselves, and less a matter of chance, the
longer the rate stays high.

    python examples/claims/averaging.py
"""

import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _common import COLORS, SEEDS, shown, split, write_claim
from torch import Tensor, nn

from lightning_optkit.averaging import EMA, LAWA, SWA, averages_of, update_average_
from lightning_optkit.data import Standardize
from lightning_optkit.schedules import cosine

STEPS, EVERY, BATCH, RATE = 1_500, 10, 32, 0.1
JUDGED = STEPS // 2 // EVERY  # measurements in the second half, where SWA begins
AVERAGES = {"EMA(0.98)": EMA(0.98), "SWA(0.5)": SWA(0.5).for_run(STEPS), "LAWA(6, every=25)": LAWA(6, every=25)}
RUNS = ("the weights themselves", *AVERAGES, "rate annealed to 0, no average")


def train(seed: int, annealed: bool) -> dict[str, list[tuple[float, float]]]:
    """Loss and accuracy on held-out digits every `EVERY` steps, for the weights and for each of their averages."""
    x_train, x_test, y_train, y_test = split("digits", seed)
    scale = Standardize().fit(x_train)
    x_train, x_test = scale(x_train).float(), scale(x_test).float()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    names = {p: name for name, p in net.named_parameters()}
    measured: dict[str, list[tuple[float, float]]] = {}
    for step in range(1, STEPS + 1):
        if annealed:
            optimizer.param_groups[0]["lr"] = RATE * cosine()(step - 1, STEPS)
        rows = torch.randint(len(x_train), (BATCH,))
        noisy = torch.where(torch.rand(BATCH) < 0.2, torch.randint(10, (BATCH,)), y_train[rows])
        optimizer.zero_grad()
        F.cross_entropy(net(x_train[rows]), noisy).backward()
        optimizer.step()
        for label, average in {} if annealed else AVERAGES.items():
            update_average_(optimizer, average, step, name=label)
        if step % EVERY:
            continue
        kept: dict[str, dict[Tensor, Tensor]] = {RUNS[-1] if annealed else RUNS[0]: {}}
        if not annealed:
            kept |= {label: averages_of(optimizer, average, label) for label, average in AVERAGES.items()}
        for label, values in kept.items():
            with torch.no_grad():
                logits = torch.func.functional_call(net, {names[p]: value for p, value in values.items()}, (x_test,))
            accuracy = float((logits.argmax(dim=1) == y_test).double().mean())
            measured.setdefault(label, []).append((float(F.cross_entropy(logits, y_test)), accuracy))
    return measured


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    by_seed = [train(seed, False) | train(seed, True) for seed in SEEDS]
    values = {label: torch.tensor([measured[label] for measured in by_seed]) for label in RUNS}  # (seeds, times, 2)
    rows, numbers = [], {}
    for label, measured in values.items():
        loss, accuracy = measured[:, -JUDGED:, 0].double(), measured[:, -1, 1]
        over_steps, over_seeds = float(loss.std(dim=1).mean()), float(loss.std(dim=0).mean())
        numbers[label] = {"loss": float(loss[:, -1].mean()), "over_steps": over_steps, "over_seeds": over_seeds}
        rows.append([label, ", ".join(shown(float(v)) for v in loss[:, -1]), shown(over_steps, 2), shown(over_seeds, 2),
                     ", ".join(f"{float(a):.1%}" for a in accuracy)])  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=[2, 1])
    every = torch.arange(EVERY, STEPS + 1, EVERY)
    for color, (label, measured) in zip(COLORS, values.items(), strict=False):
        begin = JUDGED - 1 if label.startswith("SWA") else 0  # before its start it is the curve of the weights
        losses, steps = measured[:, begin:, 0], every[begin:]
        axes[0].plot(steps, losses.mean(dim=0), color=color, label=label, linewidth=1.5)
        axes[0].fill_between(
            steps, losses.min(dim=0).values, losses.max(dim=0).values, color=color, alpha=0.15, linewidth=0
        )
        spread = losses[:, -JUDGED:].std(dim=1)
        axes[1].scatter(spread, [label] * len(spread), color=color, zorder=3)
    axes[0].axvline(STEPS // 2, color="gray", linewidth=0.8, linestyle=":")
    axes[0].set(
        xlabel="step", ylabel="loss on held-out digits", ylim=(0.25, 0.9), title="mean and range of three seeds"
    )
    axes[1].set(xlim=(0, None), title="standard deviation over the second half")
    axes[1].invert_yaxis()
    axes[0].legend(loc="upper right", fontsize=8)
    figure.tight_layout()
    write_claim(
        "averaging",
        order=9,
        title="Averages of the weights: does the loss stop jumping?",
        claim="Late in training the weights wander around a minimum; their mean lies nearer to it. An average makes "
        "the held-out loss lower and steadier without lowering the rate.",
        setup=f"Digits (1,797 images of 8x8, standardized), 64-64-64-10 with ReLU, SGD with momentum 0.9 at the "
        f"constant rate {RATE:g}, batches of {BATCH}, a fifth of the training labels replaced by chance anew in every "
        f"batch, {STEPS:,} steps; all averages kept in the same run; seeds {', '.join(map(str, SEEDS))} (weights, "
        "split, batches).",
        header=["", "loss at the end, by seed", "std over steps", "std over seeds", "accuracy at the end, by seed"],
        rows=rows,
        caption="Left: loss on the held-out quarter (mean of three seeds, and from the lowest to the highest). SWA "
        "begins at the dotted line. Right: how much each run's loss varies over the steps of its second half, a point "
        "per seed.",
        findings=findings(numbers),
        figure=figure,
        numbers=numbers,
        started=started,
    )


def findings(numbers: dict[str, dict[str, float]]) -> list[str]:
    """What the numbers say, for and against."""
    plain, said = numbers[RUNS[0]], []
    for label in AVERAGES:
        here = numbers[label]
        steadier, seeds = plain["over_steps"] / here["over_steps"], plain["over_seeds"] / here["over_seeds"]
        verdict = "as claimed" if here["loss"] < plain["loss"] and steadier > 1 else "the claim does not hold here"
        said.append(
            f"{label}: loss {here['loss']:.3f} against {plain['loss']:.3f}, {steadier:.1f} times steadier over steps "
            f"and {seeds:.1f} times over seeds: {verdict}."
        )
    annealed, best = numbers[RUNS[-1]]["loss"], min(AVERAGES, key=lambda label: numbers[label]["loss"])
    better = "lower" if numbers[best]["loss"] < annealed else "not lower"
    said.append(
        f"The best average ({best}) at a constant rate is {better} than the rate annealed to 0 ({annealed:.3f})."
    )
    return said


if __name__ == "__main__":
    main()
