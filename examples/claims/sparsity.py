# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102
"""Claim: L1 makes weights exactly zero, L2 does not; and L1 in the loss does not either.

python examples/claims/sparsity.py
"""

import time

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from _common import COLORS, SEEDS, split, write_claim
from _fitting import Batches, accuracy, mean_and_range
from rich.progress import track
from torch import Tensor, nn

from lightning_optkit.callbacks import ElasticNet
from lightning_optkit.data import Standardize
from lightning_optkit.regularization import l1_penalty

NOISE, EPOCHS, STRENGTH = 170, 60, 0.02


class Logistic(pl.LightningModule):
    """Logistic regression, with or without L1 in its loss."""

    def __init__(self, l1_in_the_loss: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.l1 = nn.Linear(30 + NOISE, 2), l1_in_the_loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss + l1_penalty([self.net.weight], self.l1) if self.l1 else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


METHODS = {
    "none": (lambda: Logistic(), lambda: []),
    "L2": (lambda: Logistic(), lambda: [ElasticNet(l2=0.1, verbose=False)]),
    "L1 in the loss": (lambda: Logistic(STRENGTH), lambda: []),
    "L1 in the step": (lambda: Logistic(), lambda: [ElasticNet(l1=STRENGTH, verbose=False)]),
    "elastic net": (lambda: Logistic(), lambda: [ElasticNet(l1=STRENGTH, l2=0.1, verbose=False)]),
}


def with_noise(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Breast cancer: 30 features that mean something, and as many again and again that are noise."""
    x_train, x_test, y_train, y_test = split("breast_cancer", seed)
    scale, generator = Standardize().fit(x_train), torch.Generator().manual_seed(seed)
    x_train, x_test = (
        torch.cat([scale(x).float(), torch.randn(len(x), NOISE, generator=generator)], dim=1) for x in (x_train, x_test)
    )
    return x_train, x_test, y_train, y_test


def main() -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    import logging
    import warnings

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    found: dict[str, dict[str, list[float]]] = {}
    weights: dict[str, Tensor] = {}
    for name, (make, callbacks) in track(METHODS.items(), description="sparsity", transient=True):
        values: dict[str, list[float]] = {key: [] for key in ("zeros of features", "zeros of noise", "test", "small")}
        for seed in SEEDS:
            x_train, x_test, y_train, y_test = with_noise(seed)
            module = make()
            trainer = pl.Trainer(
                max_epochs=EPOCHS, accelerator="cpu", devices=1, callbacks=callbacks(), logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(module, Batches(x_train, y_train, 50, seed))
            weight = module.net.weight.detach()
            values["zeros of features"].append(float((weight[:, :30] == 0).sum()))
            values["zeros of noise"].append(float((weight[:, 30:] == 0).sum()))
            values["small"].append(float((weight.abs() < 1e-2).sum()))
            values["test"].append(accuracy(module.eval(), x_test, y_test))
            weights.setdefault(name, weight)
        found[name] = values

    figure, axis = plt.subplots(figsize=(8, 3.6))
    for color, (name, weight) in zip(COLORS, weights.items(), strict=False):
        magnitudes = weight.abs().flatten().sort(descending=True).values
        nonzero = magnitudes[magnitudes > 0]
        axis.plot(range(1, len(nonzero) + 1), nonzero, color=color, label=f"{name}: {len(nonzero)} of {weight.numel()}")
        axis.scatter(len(nonzero), nonzero[-1], color=color, s=18)
    axis.set_yscale("log")
    axis.set_xlabel("weights that are not zero, by size (seed 0); the dot is the last one")
    axis.set_ylabel("|w|")
    axis.legend()
    figure.tight_layout()

    mean = {name: {key: sum(v) / len(v) for key, v in values.items()} for name, values in found.items()}
    total, proximal, in_loss = 2 * (30 + NOISE), mean["L1 in the step"], mean["L1 in the loss"]
    zeros = {name: m["zeros of features"] + m["zeros of noise"] for name, m in mean.items()}
    write_claim(
        "sparsity",
        order=71,
        title="L1 makes zeros",
        claim="The L1 norm as a regularizer makes parameters sparse, the L2 norm only small.",
        setup=f"Breast cancer (scikit-learn): 30 standardized features and {NOISE} of pure noise, logistic "
        "regression with "
        f"two outputs ({total} weights), SGD with momentum at 0.05, {EPOCHS} epochs of batches of 50, three seeds; "
        f"L1 {STRENGTH:g}, L2 0.1.",
        header=["method", "zeros among 60 weights of features", f"zeros among {2 * NOISE} weights of noise",
                "weights below 0.01", "test accuracy"],
        rows=[
            [name, mean_and_range(v["zeros of features"], ".0f"), mean_and_range(v["zeros of noise"], ".0f"),
             mean_and_range(v["small"], ".0f"), mean_and_range(v["test"])]
            for name, v in found.items()
        ],
        caption="Size of the weights, largest first. A curve that ends early has exact zeros behind its end.",
        findings=[
            f"In the step (proximal) L1 leaves {zeros['L1 in the step']:.0f} of {total} weights exactly zero, "
            f"{proximal['zeros of noise']:.0f} of them on noise; in the loss, with the same strength, "
            f"{zeros['L1 in the loss']:.0f}, though {in_loss['small']:.0f} are below 0.01.",
            f"L2 leaves {zeros['L2']:.0f} zeros, no regularization {zeros['none']:.0f}.",
            f"Test accuracy: {mean['none']['test']:.1%} without, {proximal['test']:.1%} with L1 in the step, "
            f"{mean['L2']['test']:.1%} with L2, {mean['elastic net']['test']:.1%} with both.",
        ],
        figure=figure,
        numbers=found,
        started=started,
    )  # fmt: skip


if __name__ == "__main__":
    main()
