# SPDX-License-Identifier: Apache-2.0
"""Silent errors of programs, after the list that TrainCheck reproduced (Jiang et al., OSDI 2025) and others like them.

Nothing crashes, and the loss may even fall. Each is a short module with the error in it, and the same with the line of
the verdict's remedy pasted. Errors of several processes are in tests/callbacks/gradient_health_worker.py.

python -m tests.diagnostics.benchmark.silent_errors     # one line per error, then the counts
"""

import copy
import logging
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

BATCH, EPOCHS = 8, 4


class Healthy(pl.LightningModule):
    """A classifier that learns which of three features is the largest."""

    manual = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.05))
        self.head = nn.Linear(16, 3)
        self.automatic_optimization = not self.manual

    def forward(self, x):
        return self.head(self.hidden(x))

    def hidden(self, x):
        return self.body(x)

    def loss(self, out, y):
        return F.cross_entropy(out, y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self(batch[0]), batch[1])
        if self.manual:
            self.by_hand(self.optimizers(), loss)
        return loss

    def by_hand(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def optimized(self):
        return self.parameters()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.optimized(), lr=0.02)


@dataclass(frozen=True)
class Error:
    """One error.

    Args:
        name: Its name, and whose report it is after.
        module: Class of the module that has it.
        cured: The same with the remedy pasted.
        symptom: The verdict that names it.
        cause: Words of the exact cause.
        trainer: Arguments of the Trainer.
        cured_trainer: Those after the remedy, where that is one of them.
    """

    name: str
    module: type
    cured: type
    symptom: str
    cause: str
    trainer: dict[str, Any] = field(default_factory=dict)
    cured_trainer: dict[str, Any] | None = None


class NeverZeroed(Healthy):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


class ZeroedAfterStep(NeverZeroed):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)
        optimizer.zero_grad()


class Frozen(Healthy):
    """Nothing can be trained; the loss has a gradient, that of the input."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0].clone().requires_grad_()), batch[1])


class Unfrozen(Frozen):
    def __init__(self):
        super().__init__()
        self.requires_grad_(True)


class Moved(Healthy):
    """All modules are copied after the optimizer was made, so it holds the former weights."""

    def on_train_start(self):
        self.body, self.head = copy.deepcopy(self.body), copy.deepcopy(self.head)


class MovedBefore(Healthy):
    def configure_model(self):
        self.body, self.head = copy.deepcopy(self.body), copy.deepcopy(self.head)


class NewHead(Healthy):
    def on_train_start(self):
        self.head = nn.Linear(16, 3)


class NewHeadBefore(Healthy):
    def configure_model(self):
        self.head = nn.Linear(16, 3)


class LeftOut(Healthy):
    def optimized(self):
        return self.body.parameters()


class UnfrozenLate(Healthy):
    """The body is unfrozen in the second epoch, but the optimizer was made without it."""

    def __init__(self):
        super().__init__()
        self.body.requires_grad_(False)

    def optimized(self):
        return [p for p in self.parameters() if p.requires_grad]

    def on_train_epoch_start(self):
        self.body.requires_grad_(self.current_epoch > 0)


class UnfrozenLateAndOptimized(UnfrozenLate):
    def optimized(self):
        return self.parameters()


class Detached(Healthy):
    def hidden(self, x):
        return self.body(x).detach()


class WithoutGrad(Healthy):
    @torch.no_grad()
    def hidden(self, x):
        return self.body(x)


class StepForgotten(Healthy):
    manual = True

    def by_hand(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)


class StepRemembered(StepForgotten):
    def by_hand(self, optimizer, loss):
        super().by_hand(optimizer, loss)
        self.optimizers().step()


class ClosureOnly(Healthy):
    """A hook for logging that forgets what it replaces."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()


class ClosureAndStep(Healthy):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)


class ZeroedBeforeStep(Healthy):
    manual = True

    def by_hand(self, optimizer, loss):
        self.manual_backward(loss)
        optimizer.zero_grad()
        optimizer.step()


class ZeroedBeforeBackward(Healthy):
    manual = True


class PutBack(Healthy):
    """A best state is restored before every batch, not once."""

    def on_train_start(self):
        self.best = copy.deepcopy(self.state_dict())

    def on_train_batch_start(self, batch, batch_idx):
        self.load_state_dict(self.best)


class NotPutBack(PutBack):
    def on_train_batch_start(self, batch, batch_idx):
        pass


class Narrow(Healthy):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.body[0].weight *= 2
            self.head.weight *= 2

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=9e-4, weight_decay=0.0)


class Evaluating(Healthy):
    def on_train_start(self):
        self.eval()


class Training(Evaluating):
    def on_train_start(self):
        super().on_train_start()
        self.train()


class FreshNorm(Healthy):
    def __init__(self):
        super().__init__()
        self.body.append(nn.BatchNorm1d(16))

    def on_train_start(self):
        self.body[3].eval()


class TrainedNorm(FreshNorm):
    def on_train_start(self):
        super().on_train_start()
        self.train()


class SameBatch(Healthy):
    """A new iterator at every step."""

    def train_dataloader(self):
        class First:
            def __iter__(self):
                return (next(iter(data(shuffle=False))) for _ in range(len(self)))

            def __len__(self):
                return len(data())

        return First()


class Scheduled(Healthy):
    """A cosine for the run."""

    interval = "step"

    def length(self):
        return int(self.trainer.estimated_stepping_batches)

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.length())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": self.interval}]


class LengthInEpochs(Scheduled):
    def length(self):
        return EPOCHS


class LengthInEpochsByEpoch(LengthInEpochs):
    interval = "epoch"


class LengthInSteps(Scheduled):
    interval = "epoch"


class SteppedTwice(Scheduled):
    def training_step(self, batch, batch_idx):
        self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)


class WarmUpByEpoch(Scheduled):
    interval = "epoch"

    def scheduler(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))


class WarmUpByStep(WarmUpByEpoch):
    interval = "step"


class SoftmaxTwice(Healthy):
    def loss(self, out, y):
        return F.cross_entropy(out.softmax(1), y)


class NoLogarithm(Healthy):
    def loss(self, out, y):
        return F.nll_loss(out, y)


class Regression(Healthy):
    """The same data, of which the first feature is to be told."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[0][:, 0])

    def loss(self, out, y):
        return F.mse_loss(out.squeeze(-1), y)


class Broadcast(Regression):
    def loss(self, out, y):
        return F.mse_loss(out, y)


class MaskedAll(Healthy):
    """Attention over a mask that hides everything, from the 20th step on."""

    def hidden(self, x):
        hidden = self.body(x)
        hides = torch.full_like(hidden, self.global_step >= 20, dtype=torch.bool)
        return hidden * hidden.masked_fill(hides, -math.inf).softmax(1) * 16


class MaskedBound(MaskedAll):
    def hidden(self, x):
        hidden = self.body(x)
        hides = torch.full_like(hidden, self.global_step >= 20, dtype=torch.bool)
        return hidden * hidden.masked_fill(hides, -1e6).softmax(1) * 16


class EqualUnits(Healthy):
    def __init__(self):
        super().__init__()
        self.body[2].p = 0.0
        for layer in (self.body[0], self.head):
            nn.init.constant_(layer.weight, 0.1)
            nn.init.zeros_(layer.bias)


class RandomUnits(EqualUnits):
    def __init__(self):
        super().__init__()
        for layer in (self.body[0], self.head):
            nn.init.kaiming_normal_(layer.weight)


def _average(decay):
    return {"callbacks": [ok.WeightAveraging(ok.EMA(decay))]}


ERRORS = (
    Error("no zero_grad (SO-60335387)", NeverZeroed, ZeroedAfterStep, "gradient_not_zeroed", "nothing clears them"),
    Error("nothing trainable (PT-FORUM-84911)", Frozen, Unfrozen, "not_optimized", "requires a gradient"),
    Error("optimizer holds former weights (AC-2665)", Moved, MovedBefore, "not_optimized", "was replaced"),
    Error("head replaced after the optimizer", NewHead, NewHeadBefore, "not_optimized", "was replaced"),
    Error("parameters left out", LeftOut, Healthy, "not_optimized", "in no group"),
    Error("unfrozen, not optimized", UnfrozenLate, UnfrozenLateAndOptimized, "not_optimized", "in no group"),
    Error("detached", Detached, Healthy, "no_gradient", "detach()"),
    Error("under no_grad", WithoutGrad, Healthy, "no_gradient", "torch.no_grad()"),
    Error("step forgotten", StepForgotten, StepRemembered, "not_optimized", "no optimizer takes a step"),
    Error("optimizer_step without a step", ClosureOnly, ClosureAndStep, "not_optimized", "no optimizer takes a step"),
    Error("cleared before the step", ZeroedBeforeStep, ZeroedBeforeBackward, "not_optimized", "nothing is left"),
    Error("weights put back", PutBack, NotPutBack, "lost_updates", "puts the weights back"),
    Error("bf16 weights", Narrow, Narrow, "lost_updates", "rounded away",
          {"precision": "bf16-true", "max_epochs": 40}, {"precision": "bf16-mixed", "max_epochs": 40}),
    Error("from_pretrained in eval mode", Evaluating, Training, "wrong_mode", "eval mode, so dropout"),
    Error("fresh batch norm in eval mode", FreshNorm, TrainedNorm, "wrong_mode", "never collected"),
    Error("the first batch again and again", SameBatch, Healthy, "duplicate_data", "the same batch"),
    Error("schedule in epochs, stepped by steps", LengthInEpochs, LengthInEpochsByEpoch, "schedule_fault",
          "stepped at every step"),
    Error("schedule in steps, stepped by epochs", LengthInSteps, Scheduled, "schedule_fault", "stepped once an epoch"),
    Error("scheduler stepped twice", SteppedTwice, Scheduled, "schedule_fault", "by the module and by Lightning"),
    Error("warm-up by epochs", WarmUpByEpoch, WarmUpByStep, "schedule_fault", "starts at 0 and is stepped once"),
    Error("softmax twice", SoftmaxTwice, Healthy, "loss_does_not_match_output", "result of softmax"),
    Error("nll_loss without log_softmax", NoLogarithm, Healthy, "loss_does_not_match_output", "logarithms"),
    Error("shapes broadcast", Broadcast, Regression, "loss_does_not_match_output", "different shapes"),
    Error("mask of everything", MaskedAll, MaskedBound, "nonfinite", "before this module"),
    Error("equal units", EqualUnits, RandomUnits, "symmetric_init", "equal updates"),
    Error("average longer than the run", Healthy, Healthy, "average_not_ready", "first weights",
          _average(0.9995), _average(0.9)),
)  # fmt: skip


def data(shuffle=True):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), BATCH, shuffle=shuffle, generator=generator)


class FirstSaid(pl.Callback):
    """The number of batches after which the primary verdict first had a symptom."""

    def __init__(self, health, symptom):
        self.health, self.symptom, self.batches, self.said = health, symptom, 0, None

    def on_train_batch_end(self, *args):
        """Behind the callback that it asks."""
        self.batches += 1
        verdicts = self.health.verdicts
        if self.said is None and verdicts and verdicts[0].symptom == self.symptom:
            self.said = self.batches


@dataclass(frozen=True)
class Result:
    """Of one fit: the verdicts, after how many batches the expected one was said, and what was learned, at most 1."""

    verdicts: list[Any]
    said: int | None
    score: float

    def mends(self, healthy):
        """Whether it has no verdict, and has learned 95 % of what the healthy program learns."""
        return not self.verdicts and self.score >= 0.95 * healthy.score


def run(module, symptom, check_every=1, callbacks=(), **trainer):
    """Fits the module with GradientHealth."""
    health = ok.GradientHealth(check_every, verbose=False)
    first = FirstSaid(health, symptom)
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    loader = () if hasattr(type(module), "train_dataloader") and isinstance(module, SameBatch) else (data(),)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pl.Trainer(
                callbacks=[*copy.deepcopy(list(callbacks)), health, first], accelerator="cpu",
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                **{"max_epochs": EPOCHS, **trainer},
            ).fit(module, *loader)  # fmt: skip
    finally:
        log.setLevel(level)
    return Result(health.verdicts, first.said, _score(module))


@torch.no_grad()
def _score(module):
    """On all data, in eval mode: accuracy, or the explained share of the variance."""
    module.eval()
    x, y = data().dataset.tensors
    out = module.float()(x)
    if isinstance(module, Regression):
        return 1 - float(F.mse_loss(out.squeeze(-1), x[:, 0]) / x[:, 0].var())
    return float((out.argmax(1) == y).float().mean())


def main():
    named = exact = cured = 0
    healthy = {kind: run(kind(), "", check_every=200) for kind in (Healthy, Regression)}
    said = []
    for error in ERRORS:
        broken = run(error.module(), error.symptom, **error.trainer)
        first = broken.verdicts[0] if broken.verdicts else None
        is_named = first is not None and first.symptom == error.symptom
        is_exact = is_named and error.cause in first.cause
        mended = run(error.cured(), error.symptom, **(error.cured_trainer or error.trainer))
        twin = healthy[Regression if issubclass(error.module, Regression) else Healthy]
        is_cured = mended.mends(twin)
        named, exact, cured = named + is_named, exact + is_exact, cured + is_cured
        said.append(broken.said)
        print(f"{error.name}: {first.symptom if first else None}, exact {is_exact}, after {broken.said} batches, "
              f"cured {is_cured}; score {broken.score:.3f} -> {mended.score:.3f}, healthy {twin.score:.3f}"
              f"{'' if not mended.verdicts else '; still ' + mended.verdicts[0].symptom}")  # fmt: skip
    print(f"{len(ERRORS)} errors: {named} named, {exact} with the exact cause, {cured} cured by the remedy; "
          f"said after {sorted(b for b in said if b)} batches")  # fmt: skip


if __name__ == "__main__":
    main()
