# SPDX-License-Identifier: Apache-2.0
"""Claim: features of different scales make gradient descent slow; standardizing helps, and whitening removes what
correlation is left.

    python examples/claims/preprocessing.py
"""

import time
from collections.abc import Callable, Sequence
from statistics import median

import matplotlib.pyplot as plt
import torch
from _common import COLORS, SEEDS, SideBySide, best_rate, by_seed, shown, split, steps_to, train, verdict, write_claim
from torch import Tensor, nn

from lightning_optkit.data import MinMaxScale, Standardize, Whiten
from lightning_optkit.init import initialize, xavier

BATCH, STEPS, EVERY = 64, 300, 1
DATA = ("breast_cancer", "wine")
WANTED = 0.02
RATES = tuple(10 ** (exponent / 2) for exponent in range(-16, 5))
TRANSFORMS: dict[str, Callable[[], nn.Module]] = {
    "raw": nn.Identity,
    "min-max": MinMaxScale,
    "standardized": Standardize,
    "whitened (PCA)": Whiten,
    "whitened (ZCA)": lambda: Whiten("zca"),
}


def fitted(make: Callable[[], nn.Module], x_train: Tensor) -> nn.Module:
    transform = make()
    return transform.fit(x_train) if hasattr(transform, "fit") else transform  # type: ignore[no-any-return,operator]


def condition(x: Tensor) -> float:
    """Condition number of the covariance: how much steeper the steepest direction is than the flattest."""
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T))
    return float(eigenvalues[-1] / eigenvalues[0].clamp(min=1e-300))


def network(num_features: int, num_classes: int, seed: int) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(num_features, 32), nn.Tanh(), nn.Linear(32, num_classes))
    initialize(net, xavier, generator=torch.Generator().manual_seed(seed))
    return net


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6))
    rows = []
    for line, name in enumerate(DATA):
        for color, (kind, make) in zip(COLORS, TRANSFORMS.items(), strict=False):
            data, conditions = [], []
            for seed in SEEDS:
                x_train, x_test, y_train, y_test = split(name, seed)
                transform = fitted(make, x_train)
                conditions.append(condition(transform(x_train)))
                data.append((transform(x_train).float(), transform(x_test).float(), y_train, y_test))
            nets = [network(data[0][0].shape[1], int(data[0][2].max()) + 1, seed) for seed in SEEDS]
            rates = torch.tensor(RATES).repeat_interleave(len(SEEDS))
            accuracies, losses = train(
                SideBySide([net for _ in RATES for net in nets]), rates, data * len(RATES),
                steps=STEPS, batch_size=BATCH, every=EVERY, what=f"{name}, {kind}", whole_loss=True,
            )  # fmt: skip
            needed = steps_to(losses <= WANTED, EVERY).view(len(RATES), len(SEEDS))
            final = accuracies[-10:].mean(dim=0).view(len(RATES), len(SEEDS))
            medians, loss = needed.median(dim=1).values, losses[-10:].mean(dim=0).view(len(RATES), -1).nan_to_num(1e9)
            scores = zip(medians.tolist(), loss.median(dim=1).values.tolist(), strict=True)
            rate = best_rate(dict(zip(RATES, scores, strict=True)))
            at = RATES.index(rate)
            columns = slice(at * len(SEEDS), (at + 1) * len(SEEDS))
            steps = torch.arange(EVERY, STEPS + 1, EVERY)
            axes[line][0].plot(steps, losses[:, columns].median(dim=1).values, color=color, label=kind, linewidth=1.5)
            axes[line][1].plot(RATES, final.median(dim=1).values, color=color, marker="o", markersize=3, linewidth=1.2)
            rows.append([
                name.replace("_", " "), kind, f"{sorted(conditions)[1]:.1e}", f"{rate:.2g}",
                ", ".join(shown(float(n), 4) for n in needed[at]),
                ", ".join(f"{float(a):.1%}" for a in final[at]),
            ])  # fmt: skip
        axes[line][0].set_ylabel(f"{name.replace('_', ' ')}\ntraining loss")
        axes[line][0].set_yscale("log")
        axes[line][0].axhline(WANTED, color="gray", linewidth=0.8, linestyle=":")
        axes[line][1].set_xscale("log")
        axes[line][1].set_ylabel("test accuracy at the end")
    axes[0][0].set_title("training loss at each one's best rate", fontsize=10)
    axes[0][1].set_title("test accuracy over learning rates", fontsize=10)
    axes[1][0].set_xlabel("step")
    axes[1][1].set_xlabel("learning rate")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, bbox_to_anchor=(0.5, -0.04))
    figure.tight_layout()
    write_claim(
        "preprocessing",
        order=2,
        title="Preprocessing: raw, scaled, whitened inputs",
        claim="Features of very different scales make the loss steep in one direction and flat in another, so gradient "
        "descent is slow; standardizing makes the directions alike, and whitening removes correlation too (NNDL 7.4).",
        setup="Breast cancer (569 rows, 30 features) and wine (178 rows, 13 features), one hidden layer of 32 tanh "
        f"units, Xavier, SGD with momentum 0.9, batches of {BATCH}, {STEPS} steps; each at its best of {len(RATES)} "
        "rates from 1e-8 to 100; statistics from the training part only; seeds 0, 1, 2 (weights and split).",
        header=["data", "inputs", "condition of the covariance", "best rate",
                f"steps to training loss {WANTED}, by seed", "test accuracy at the end, by seed"],
        rows=rows,
        caption=f"Left: training loss at each transform's best rate, the one that reaches {WANTED} (dotted) first. "
        f"Right: test accuracy after {STEPS} steps, by learning rate. Medians of three seeds.",
        findings=findings(rows),
        figure=figure,
        started=started,
    )  # fmt: skip


def findings(rows: Sequence[Sequence[str]]) -> list[str]:
    """What the numbers say, for and against."""
    steps = {(row[0], row[1]): by_seed(row[4]) for row in rows}
    accuracy = {(row[0], row[1]): sorted(row[5].split(", "), key=lambda a: float(a[:-1]))[1] for row in rows}
    said = []
    for label in (name.replace("_", " ") for name in DATA):
        raw, standard = steps[label, "raw"], steps[label, "standardized"]
        needed = f"standardized inputs need {shown(median(standard))} steps, raw ones {shown(median(raw))} (median)"
        said.append(f"{label}: {needed}: {verdict(standard, raw)}.")
        for kind in ("whitened (PCA)", "whitened (ZCA)"):
            white = steps[label, kind]
            needed = f"{kind} inputs need {shown(median(white))} steps, standardized ones {shown(median(standard))}"
            tested = f"Test accuracy: {accuracy[label, kind]} against {accuracy[label, 'standardized']} (medians)"
            said.append(f"{label}: {needed}: {verdict(white, standard)}. {tested}.")
    return said


if __name__ == "__main__":
    main()
