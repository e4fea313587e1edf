# SPDX-License-Identifier: Apache-2.0
"""How far the step at which a verdict says a fault began is from where it did, for faults that begin within a run.

python -m tests.diagnostics.benchmark.onset
"""

import random
import statistics

import torch

from tests.diagnostics.benchmark.silent_errors import Healthy, run
from tests.diagnostics.benchmark.table import claim

EVERY, EPOCHS, TIMES = 20, 6, 6  # check_every, epochs of 32 steps, runs per kind


class Late(Healthy):
    """A healthy program until step `begins`."""

    begins = 0

    @property
    def is_broken(self):
        return self.global_step >= self.begins


class Infinite(Late):
    def hidden(self, x):
        return self.body(x) / (0.0 if self.is_broken else 1.0)


class NotZeroed(Late):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if not self.is_broken:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)


class Evaluating(Late):
    def on_train_batch_start(self, batch, batch_idx):
        if self.is_broken:
            self.eval()


class Unfrozen(Late):
    def __init__(self):
        super().__init__()
        self.body.requires_grad_(False)

    def optimized(self):
        return self.head.parameters()

    def on_train_batch_start(self, batch, batch_idx):
        self.body.requires_grad_(self.is_broken)


class Stopped(Late):
    """The rate falls to 0 long before the end."""

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < self.begins)),
                "interval": "step",
            }
        ]


KINDS = {
    Infinite: "nonfinite",
    NotZeroed: "gradient_not_zeroed",
    Evaluating: "wrong_mode",
    Unfrozen: "not_optimized",
    Stopped: "schedule_fault",
}


def error_of(kind, begins):
    """Steps between where the verdict says it began and where it did; None if it is not the first verdict."""
    module = kind()
    module.begins = begins
    verdicts = run(module, KINDS[kind], EVERY, max_epochs=EPOCHS).verdicts
    return abs(verdicts[0].onset_step - begins) if verdicts and verdicts[0].symptom == KINDS[kind] else None


def main():
    drawn, errors = random.Random(0), []
    for kind in KINDS:
        found = [error_of(kind, drawn.randrange(40, 120)) for _ in range(TIMES)]
        errors += found
        print(f"{KINDS[kind]}: {found}", flush=True)
    named = [error for error in errors if error is not None]
    print(f"named {claim(len(named), len(errors))}; median {statistics.median(named):g} steps, largest {max(named)}; "
          f"in checks {statistics.median(named) / EVERY:.2f} and {max(named) / EVERY:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
