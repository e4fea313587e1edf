# SPDX-License-Identifier: Apache-2.0
"""Claim: in a deep network the initialization decides whether signal and gradient arrive, and so whether it trains.

python examples/claims/initialization.py
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _common import COLORS, SEEDS, SideBySide, best_rate, by_seed, shown, split, steps_to, train, verdict, write_claim
from torch import Tensor, nn

from lightning_optkit.data import Standardize
from lightning_optkit.init import he, initialize, lsuv, orthogonal, xavier

DEPTH, WIDTH, BATCH, STEPS, EVERY, WANTED = 30, 64, 64, 800, 20, 0.9
RATES = (0.001, 0.003, 0.01, 0.03)
ACTIVATIONS = {"tanh": nn.Tanh, "ReLU": nn.ReLU}


def constant(tensor: Tensor) -> Tensor:
    """Every weight 0.1."""
    return nn.init.constant_(tensor, 0.1)


def small_normal(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """N(0, 0.01^2), whatever the size of the layer."""
    return nn.init.normal_(tensor, std=0.01, generator=generator)


SCHEMES: dict[str, Callable[..., Tensor] | None] = {
    "constant 0.1": constant,
    "N(0, 0.01²)": small_normal,
    "Xavier": partial(xavier, activation="linear"),
    "He": partial(he, activation="relu"),
    "orthogonal": partial(orthogonal, activation="linear"),
    "LSUV": None,  # takes a batch
}


def network(activation: type[nn.Module], scheme: str, seed: int, x: Tensor) -> nn.Sequential:
    sizes = [64, *[WIDTH] * (DEPTH - 1), 10]
    layers = [layer for i in range(DEPTH) for layer in (nn.Linear(sizes[i], sizes[i + 1]), activation())]
    net, generator = nn.Sequential(*layers[:-1]), torch.Generator().manual_seed(seed)
    fill = SCHEMES[scheme]
    if fill is None:
        lsuv(net, x[:512], generator=generator)
    else:
        initialize(net, fill, generator=generator)
    return net


def variances(nets: SideBySide, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of every hidden activation and of the loss's gradient by it, both (depth, R)."""
    outputs: list[Tensor] = []
    logits = nets(x, outputs)
    hidden = outputs[1::2]
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / x.shape[1]
    grads = torch.autograd.grad(loss, hidden)
    return tuple(torch.stack([t.detach().double().flatten(1).var(dim=1) for t in ts]) for ts in (hidden, grads))  # type: ignore[return-value]


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)  # many small matrices
    torch.set_flush_denormal(True)  # what dies would make the processor slow
    data = []
    for seed in SEEDS:
        x_train, x_test, y_train, y_test = split("digits", seed)
        scale = Standardize().fit(x_train)
        data.append((scale(x_train).float(), scale(x_test).float(), y_train, y_test))
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 5.6))
    rows, numbers = [], {}
    for line, (name, activation) in enumerate(ACTIVATIONS.items()):
        for color, scheme in zip(COLORS, SCHEMES, strict=False):
            nets = [network(activation, scheme, seed, x) for seed, (x, *_) in zip(SEEDS, data, strict=True)]
            probe = SideBySide(nets)
            x, y = torch.stack([d[0][:512] for d in data]), torch.stack([d[2][:512] for d in data])
            signal, gradient = (v.median(dim=1).values for v in variances(probe, x, y))
            many = SideBySide([net for _ in RATES for net in nets])
            rates = torch.tensor(RATES).repeat_interleave(len(SEEDS))
            accuracies, _ = train(
                many, rates, data * len(RATES), steps=STEPS, batch_size=BATCH, every=EVERY, what=f"{name}, {scheme}"
            )
            needed = steps_to(accuracies >= WANTED, EVERY).view(len(RATES), len(SEEDS))
            final = accuracies[-1].view(len(RATES), len(SEEDS)).nan_to_num(0)
            scores = zip(needed.median(dim=1).values.tolist(), (-final.median(dim=1).values).tolist(), strict=True)
            rate = best_rate(dict(zip(RATES, scores, strict=True)))
            at = RATES.index(rate)
            depth, dash = torch.arange(1, DEPTH), "--" if scheme in ("orthogonal", "He") else "-"  # some lie on others
            for axis, values in zip(axes[line], (signal, gradient), strict=False):
                axis.plot(depth, values.clamp(min=1e-40), color=color, label=scheme, linewidth=1.6, linestyle=dash)
            steps = torch.arange(EVERY, STEPS + 1, EVERY)
            middle = accuracies[:, at * len(SEEDS) : (at + 1) * len(SEEDS)].median(dim=1).values
            axes[line][2].plot(steps, middle, color=color, linewidth=1.6, linestyle=dash)
            rows.append([
                name, scheme, f"{float(signal[0]):.1e}", f"{float(signal[-1]):.1e}", f"{float(gradient[0]):.1e}",
                f"{float(gradient[-1]):.1e}", ", ".join(shown(float(n), 4) for n in needed[at]), f"{rate:g}",
                f"{float(final[at].median()):.1%}",
            ])  # fmt: skip
            numbers[f"{name}, {scheme}"] = {
                "signal": signal.tolist(), "gradient": gradient.tolist(), "steps": float(needed[at].median())
            }  # fmt: skip
        axes[line][0].set_ylabel(name, fontsize=11, fontweight="bold")
    titles = ("variance of the activations", "variance of the gradients", "test accuracy")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes[:, :2].flat:
        axis.set_yscale("log")
        axis.set_ylim(1e-34, 1e8)
    for axis in axes[:, 2]:
        axis.axhline(WANTED, color="gray", linewidth=0.8, linestyle=":")
        axis.set_ylim(0, 1)
    for axis, label in zip(axes[1], ("layer", "layer", "step"), strict=True):
        axis.set_xlabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=6, bbox_to_anchor=(0.5, -0.05))
    figure.tight_layout()
    write_claim(
        "initialization",
        order=1,
        title="Initialization: does the signal reach the other end?",
        claim="Equal weights never become different, small random ones let signal and gradient die with depth; Xavier "
        "(for tanh) and He (for ReLU) keep their variance, orthogonal weights and LSUV as well (NNDL 7.3).",
        setup=f"Digits (1,797 images of 8x8, standardized), {DEPTH} fully connected layers of {WIDTH}, SGD with "
        f"momentum 0.9, batches of {BATCH}, {STEPS} steps, biases 0; Xavier and orthogonal with gain 1, He with "
        f"that of ReLU, whatever follows; LSUV on 512 training images. Each scheme at its best of the rates "
        f"{', '.join(f'{r:g}' for r in RATES)}; seeds {', '.join(map(str, SEEDS))} (weights and split).",
        header=["", "scheme", "variance, layer 1", f"layer {DEPTH - 1}", "gradient, layer 1", f"layer {DEPTH - 1}",
                f"steps to {WANTED:.0%}, by seed", "rate", "accuracy at the end"],
        rows=rows,
        caption="Left and middle: variance of every layer's activations, and of the loss's gradient by them, before "
        "training (median of three seeds; what leaves the picture goes on). Right: test accuracy at each scheme's best "
        "rate (median).",
        findings=findings(rows, numbers),
        figure=figure,
        numbers=numbers,
        started=started,
    )  # fmt: skip


def findings(rows: Sequence[Sequence[str]], numbers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the numbers say, for and against."""
    steps = {(row[0], row[1]): by_seed(row[6]) for row in rows}
    said = []
    for bad in ("constant 0.1", "N(0, 0.01²)"):
        trains = any(min(steps[activation, bad]) < math.inf for activation in ACTIVATIONS)
        said.append(f"{bad}: {'the claim does not hold, it trains' if trains else 'never trains, as claimed'}.")
    for activation, right, wrong in (("tanh", "Xavier", "He"), ("ReLU", "He", "Xavier")):
        ours, other = steps[activation, right], steps[activation, wrong]
        needed = f"{right} needs {shown(median(ours))} steps, {wrong} {shown(median(other))} (median)"
        said.append(f"{activation}: {needed}: {verdict(ours, other)}.")
    for activation in ACTIVATIONS:
        fastest = min(SCHEMES, key=lambda scheme: median(steps[activation, scheme]))
        said.append(f"{activation}: fastest is {fastest}, {shown(median(steps[activation, fastest]))} steps (median).")
    drop = numbers["ReLU, Xavier"]["signal"]
    said.append(f"ReLU with Xavier loses a factor {drop[0] / max(drop[-1], 1e-300):.1e} of variance over the depth.")
    return said


if __name__ == "__main__":
    main()
