# SPDX-License-Identifier: Apache-2.0
"""What narrow weights and state do to training: three tasks, several seeds, one table.

Every variant of a task and seed starts from the same weights and sees the same batches; AdamW, with a rate that falls
to 0 by a cosine. The reference is mixed precision with a master copy: bf16 weights in the model, fp32 weights in an
fp32 AdamW, copied after every step. split32 must follow it.

With `--noise` only the noise of narrow state: the relative error of AdamW's update under Gaussian gradients.

Usage: python benchmarks/precision_convergence.py [--steps 600] [--seeds 0 1 2] [--tasks digits chars diabetes]
           [--variants ...] [--save] [--noise]
"""

import argparse
import inspect
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from harness import environment, progress, results_file
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import cosine
from lightning_optkit.step.split_weights import split_

VARIANTS: dict[str, dict[str, Any]] = {
    "bf16 + fp32 master copy": {},
    "bf16, split32": dict(rounding="split32"),
    "bf16, split24": dict(rounding="split24"),
    "bf16, split24, int8 state": dict(rounding="split24", state_dtype="int8"),
    "bf16, kahan": dict(rounding="kahan"),
    "bf16, stochastic": dict(rounding="stochastic"),
    "bf16, nearest": dict(rounding="nearest"),
    "fp32": {},
    "fp32, bf16 state": dict(state_dtype=torch.bfloat16),
    "fp32, int8 state": dict(state_dtype="int8"),
}
MASTER = "bf16 + fp32 master copy"


@dataclass(frozen=True)
class Result:
    """One training: the loss of step 200, the mean of the last tenth, and the distance to the master copy's losses."""

    task: str
    variant: str
    seed: int
    loss_at_200: float
    final_loss: float
    largest_difference: float  # over the first 200 steps


class Transformer(nn.Module):
    """Two causal layers of width 64 on characters."""

    def __init__(self, vocabulary: int = 128, width: int = 64, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, vocabulary, length)."""
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=self.head.weight.dtype)
        hidden = self.tokens(x) + self.places(torch.arange(length))
        return self.head(self.layers(hidden, mask=mask, is_causal=True)).transpose(1, 2)


def convolutional() -> nn.Module:
    """For 8 x 8 images."""
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32 * 16, 10))


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of handwritten digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)


def diabetes() -> tuple[Tensor, Tensor]:
    """442 patients, 10 measurements; standardized."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32)
    return (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std())[:, None]


def chars() -> tuple[Tensor, Tensor]:
    """Windows of 64 characters from the source of modules of Python's library, and the next characters."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, statistics, json))
    codes = torch.tensor([min(ord(c), 127) for c in text])
    windows = codes[: len(codes) // 65 * 65].view(-1, 65)
    return windows[:, :-1], windows[:, 1:]


TASKS: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "digits": (digits, convolutional, functional.cross_entropy),
    "chars": (chars, Transformer, functional.cross_entropy),
    "diabetes": (
        diabetes,
        lambda: nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        functional.mse_loss,
    ),
}


def trained(task: str, variant: str, seed: int, steps: int) -> list[float]:
    """The loss of every step."""
    load, build, loss_of = TASKS[task]
    inputs, targets = load()
    torch.manual_seed(seed)
    model = build()
    is_bf16 = variant.startswith("bf16")
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    if is_bf16:
        model.bfloat16()
        masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    params = list(model.parameters())
    optimizer = AdamW(masters if variant == MASTER else params, lr=3e-3, **VARIANTS[variant])
    schedule = cosine(steps=steps)
    batches = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step, steps)
        place = torch.randint(len(inputs), (32,), generator=batches)
        x, y = inputs[place], targets[place]
        x = x.bfloat16() if is_bf16 and x.is_floating_point() else x
        loss = loss_of(model(x).float(), y)
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        if variant == MASTER:
            step_masters(optimizer, masters, params)
        else:
            optimizer.step()
    return losses


@torch.no_grad()
def step_masters(optimizer: AdamW, masters: list[Tensor], params: list[nn.Parameter]) -> None:
    """One step of the fp32 weights; the bf16 weights are their copy, rounded as split weights are (ties upwards)."""
    for master, param in zip(masters, params, strict=True):
        assert param.grad is not None
        master.grad = param.grad.float()
    optimizer.step()
    for master, param in zip(masters, params, strict=True):
        split_(param, torch.empty_like(param, dtype=torch.int16), master)


def results(tasks: list[str], variants: list[str], seeds: list[int], steps: int) -> Iterator[Result]:
    """Every variant of every task and seed."""
    for task, seed in progress([(task, seed) for task in tasks for seed in seeds]):
        reference = trained(task, MASTER, seed, steps)
        for variant in variants:
            losses = reference if variant == MASTER else trained(task, variant, seed, steps)
            distance = max(abs(a - b) for a, b in zip(losses[:200], reference[:200], strict=True))
            at_200 = losses[min(199, len(losses) - 1)]
            yield Result(task, variant, seed, at_200, statistics.fmean(losses[-max(1, steps // 10) :]), distance)


def noise_of(state_dtype: Any, steps: int = 5000, counted: int = 100) -> float:
    """|update - fp32's| / |fp32's| of AdamW, betas 0.9 and 0.999: the mean of the last `counted` steps."""
    torch.manual_seed(0)
    pair = [torch.zeros(4096, requires_grad=True) for _ in range(2)]
    optimizers = [AdamW([pair[0]], weight_decay=0.0), AdamW([pair[1]], weight_decay=0.0, state_dtype=state_dtype)]
    errors = []
    for step in range(steps):
        before = [weight.detach().clone() for weight in pair]
        grad = torch.randn(4096)
        for weight, optimizer in zip(pair, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
        exact, ours = ((weight.detach() - old).double() for weight, old in zip(pair, before, strict=True))
        if step >= steps - counted:
            errors.append(float((ours - exact).norm() / exact.norm()))
    return statistics.fmean(errors)


def table(found: list[Result]) -> Table:
    """The final loss of each task and variant: mean and range over the seeds."""
    made = Table(title="mean loss of the last tenth; largest distance to the master copy in 200 steps")
    by_case: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in found:
        by_case[result.task, result.variant].append(result)
    for name in ("task", "variant", "final loss", "range", "distance"):
        made.add_column(name, justify="left" if name in ("task", "variant") else "right")
    for (task, variant), several in by_case.items():
        finals = [result.final_loss for result in several]
        distance = max(result.largest_difference for result in several)
        spread = f"{min(finals):.4f} to {max(finals):.4f}"
        made.add_row(task, variant, f"{statistics.fmean(finals):.4f}", spread, f"{distance:.1e}")
    return made


def main() -> None:
    """Trains everything, and prints rows and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--save", action="store_true", help="add the rows to benchmarks/results/")
    parser.add_argument("--noise", action="store_true", help="only the noise of narrow state")
    given = parser.parse_args()
    if given.noise:
        for state_dtype in (torch.bfloat16, "int8"):
            print(json.dumps({"state": str(state_dtype), "noise": round(noise_of(state_dtype), 4)}))
        return
    facts, found = environment(), []
    path = results_file("convergence", facts)
    for result in results(given.tasks, given.variants, given.seeds, given.steps):
        found.append(result)
        line = json.dumps({**asdict(result), "steps": given.steps, **facts})
        print(line, flush=True)
        if given.save:
            with path.open("a") as file:
                file.write(line + "\n")
    Console(file=sys.stderr, width=120).print(table(found))
    if given.save:
        print(f"added to {os.path.relpath(path)}", file=sys.stderr)


if __name__ == "__main__":
    main()
