# SPDX-License-Identifier: Apache-2.0
"""Shared by the claims: real data, many small networks trained together, figures, and the fragment of each claim.

A script of this folder measures one claim, draws one figure and calls `write_claim`; `run.py` runs them all and puts
the fragments together. A new claim is a new script, nothing else.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
FRAGMENTS = ROOT / "docs" / "claims"
FIGURES = ROOT / "docs" / "figures" / "claims"
SEEDS = (0, 1, 2)

# Colors that stay apart in print and for color-blind readers (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

plt.rcParams.update(
    {
        "figure.dpi": 110, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.25, "legend.frameon": False, "svg.hashsalt": "claims", "svg.fonttype": "path",
    }
)  # fmt: skip


def split(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test inputs and labels of a data set bundled with scikit-learn, a fourth held out by `seed`."""
    data = getattr(datasets, f"load_{name}")()
    parts = train_test_split(data.data, data.target, test_size=0.25, random_state=seed, stratify=data.target)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in parts)
    return x_train, x_test, y_train, y_test


class SideBySide(nn.Module):
    """R networks of one structure, as one: every parameter has a first dimension R, and so have inputs and outputs.

    Args:
        nets: Networks of Linear, BatchNorm1d, LayerNorm and activations.
    """

    def __init__(self, nets: Sequence[nn.Sequential]) -> None:
        super().__init__()
        self.num_nets, self.structure = len(nets), list(nets[0])
        self.values = nn.ParameterDict()
        for place, layer in enumerate(self.structure):
            for name, _ in layer.named_parameters():
                stacked = torch.stack([getattr(net[place], name).detach() for net in nets])
                self.values[f"{place} {name}"] = nn.Parameter(stacked)
        self.running = {
            place: [torch.zeros(self.num_nets * layer.num_features), torch.ones(self.num_nets * layer.num_features)]
            for place, layer in enumerate(self.structure)
            if isinstance(layer, nn.BatchNorm1d)
        }

    def forward(self, x: Tensor, outputs: list[Tensor] | None = None) -> Tensor:
        """Logits (R, N, C) of inputs (R, N, D); `outputs` collects what every layer puts out."""
        for place, layer in enumerate(self.structure):
            if isinstance(layer, nn.Linear):
                weight, bias = self.values[f"{place} weight"], self.values[f"{place} bias"]
                x = torch.baddbmm(bias[:, None], x, weight.mT)
            elif isinstance(layer, nn.BatchNorm1d):
                x = self._batch_norm(place, x)
            elif isinstance(layer, nn.LayerNorm):
                x = F.layer_norm(x, layer.normalized_shape)
                x = x * self.values[f"{place} weight"][:, None] + self.values[f"{place} bias"][:, None]
            else:
                x = layer(x)
            if outputs is not None:
                outputs.append(x)
        return x

    def _batch_norm(self, place: int, x: Tensor) -> Tensor:
        weight, bias = (self.values[f"{place} {name}"].flatten() for name in ("weight", "bias"))
        side_by_side = x.transpose(0, 1).flatten(1)  # (N, R * D): every column has its own statistics
        y = F.batch_norm(side_by_side, *self.running[place], weight, bias, training=self.training)
        return y.view(len(y), self.num_nets, -1).transpose(0, 1)


def train(
    nets: SideBySide,
    rates: Tensor,
    data: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    steps: int,
    batch_size: int,
    every: int,
    what: str,
    momentum: float = 0.9,
    whole_loss: bool = False,
) -> tuple[Tensor, Tensor]:
    """SGD with momentum, each network with its own rate and data; test accuracies (steps / every, R) and losses.

    Args:
        nets: R networks.
        rates: Learning rates (R,).
        data: Train and test inputs and labels of every network; all of one size.
        steps: Steps of training.
        batch_size: Examples per step.
        every: Steps between measurements.
        what: Shown beside the progress bar.
        momentum: Of SGD.
        whole_loss: Whether losses are those of the whole training set, not of the batch.
    """
    x_train, x_test, y_train, y_test = (torch.stack(part) for part in zip(*data, strict=True))
    generator = torch.Generator().manual_seed(0)
    params = list(nets.parameters())
    velocity = [torch.zeros_like(p) for p in params]
    accuracies, losses = [], []
    for step in track(range(1, steps + 1), description=f"{what:<24}", transient=True):
        nets.train()
        rows = torch.randint(x_train.shape[1], (batch_size,), generator=generator)
        logits = nets(x_train[:, rows])
        loss = F.cross_entropy(logits.flatten(0, 1), y_train[:, rows].flatten(), reduction="none")
        loss = loss.view(len(rates), -1).mean(dim=1)
        grads = torch.autograd.grad(loss.sum(), params)
        with torch.no_grad():
            for p, v, g in zip(params, velocity, grads, strict=True):
                v.mul_(momentum).add_(g)
                p.sub_(rates.view(-1, *[1] * (p.dim() - 1)) * v)
            if step % every == 0:
                nets.eval()
                accuracies.append((nets(x_test).argmax(dim=2) == y_test).double().mean(dim=1))
                if whole_loss:
                    whole = F.cross_entropy(nets(x_train).flatten(0, 1), y_train.flatten(), reduction="none")
                    loss = whole.view(len(rates), -1).mean(dim=1)
                losses.append(loss.detach())
    return torch.stack(accuracies), torch.stack(losses)


def steps_to(reached: Tensor, every: int) -> Tensor:
    """First measured step at which each network (T, R) has `reached` what is wanted; infinity if it never has."""
    first = (reached.to(torch.uint8).argmax(dim=0) + 1) * every
    return torch.where(reached.any(dim=0), first.double(), math.inf)


def shown(value: float, digits: int = 3) -> str:
    """A number for a table; "never" for infinity."""
    return "never" if math.isinf(value) else f"{value:.{digits}g}"


def by_seed(cell: str) -> list[float]:
    """The numbers of a table's cell, such as "40, 60, never"."""
    return [math.inf if number == "never" else float(number) for number in cell.split(", ")]


def verdict(faster: Sequence[float], slower: Sequence[float]) -> str:
    """Whether what should need fewer steps does: at all seeds, in the median only, or not."""
    if max(faster) < min(slower):
        return "as claimed, at all seeds"
    if median(faster) < median(slower):
        return "as claimed in the median, but the seeds overlap: no clear difference"
    return "the claim does not hold here"


def write_claim(
    name: str,
    *,
    order: int,
    title: str,
    claim: str,
    setup: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str,
    findings: Sequence[str],
    figure: Any,
    numbers: Any = None,
    started: float,
) -> None:
    """Writes the figure and the fragment of one claim.

    Args:
        name: Stem of the script and of what it writes.
        order: Place in docs/claims.md.
        title: Heading.
        claim: What the textbook says, in one or two sentences.
        setup: Data, network, optimizer, seeds.
        header: Titles of the table.
        rows: Its cells.
        caption: What the figure shows.
        findings: Sentences on what was measured, also where the claim does not hold.
        figure: A matplotlib figure.
        numbers: Other values for the JSON file.
        started: `time.perf_counter()` at the start.
    """
    FRAGMENTS.mkdir(parents=True, exist_ok=True)
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    fragment = {
        "order": order, "title": title, "claim": claim, "setup": setup, "header": list(header),
        "rows": [list(row) for row in rows], "caption": caption, "findings": list(findings),
        "figure": f"figures/claims/{name}.svg", "script": f"examples/claims/{name}.py",
        "seconds": round(time.perf_counter() - started), "numbers": numbers,
    }  # fmt: skip
    (FRAGMENTS / f"{name}.json").write_text(json.dumps(fragment, indent=1) + "\n")
    print(f"{title}: {fragment['seconds']} s")
    for finding in findings:
        print(f"  {finding}")


def best_rate(scores: Mapping[float, Any]) -> float:
    """The rate with the lowest score, the largest of several."""
    return min(sorted(scores, reverse=True), key=lambda rate: scores[rate])
