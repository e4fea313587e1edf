# SPDX-License-Identifier: Apache-2.0
"""Faults that break a healthy run on purpose, three strengths each, and the verdicts that name them.

The accepted symptoms were written down before the rules that are to find them. "mechanical" faults are errors of the
program and count always; the others count only in runs that they hurt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lightning_optkit as ok


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Args:
        name: Its name.
        accepted: Symptoms, any of which as the primary verdict names it.
        strengths: From weak to strong.
        apply: Called with the setup and a strength; changes the setup.
        fits: Whether it can be planted in a setup.
        is_mechanical: Whether it is an error whatever it does to the score.
        mend: Called with the healthy setup and the strength, to make of it what a run that it does not hurt is compared
            with. Without, that is the healthy setup itself.
    """

    name: str
    accepted: frozenset[str]
    strengths: tuple[Any, ...]
    apply: Callable[[Any, Any], object]
    fits: Callable[[Any], bool] = lambda setup: True
    is_mechanical: bool = True
    mend: Callable[[Any, Any], object] = lambda setup, strength: None


def has_body(setup):
    return any(True for _ in setup.body.parameters())


def layers_of(setup):
    """The dense and convolutional layers, in order."""
    return [m for part in (setup.body, setup.head) for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def _detached(setup, how):
    def forward(body, head, x):
        if how == "no_grad":
            with torch.no_grad():
                hidden = body(x)
        else:
            hidden = body(x).data if how == "data" else body(x).detach()
        return head(hidden)

    setup.forward = forward


def _missing(setup, what):
    def optimized(module):
        if what == "body":
            return module.head.parameters()
        if what == "head":
            return module.body.parameters()
        return [*module.parameters()][2:]

    setup.optimized = optimized


def _not_zeroed(setup, how):
    setup.zeroes, setup.manual = False, how == "manual"
    if how == "accumulating":
        setup.trainer["accumulate_grad_batches"] = 2


def _lost(setup, factor):
    setup.trainer["precision"] = "bf16-true"
    setup.optimizer = "adamw" if setup.optimizer.startswith("sgd") else setup.optimizer
    setup.lr_factor = factor


def _nan_in_batch(setup, count):
    x, y, x_val, y_val = setup.data
    x = x.clone()
    x.reshape(len(x), -1)[7 : 7 + count, 0] = float("nan")
    setup.data = (x, y, x_val, y_val)


def _log_of_zero(setup, how):
    def loss(out, y):
        scores = {"relu": F.relu(out), "relu6": F.relu6(out), "square": F.relu(out).square()}[how]
        return F.nll_loss(torch.log(scores), y)

    setup.loss = loss


def _root_of_zero(setup, how):
    def forward(body, head, x):
        hidden = body(x)
        positive = hidden * (hidden > 0)  # relu() would stop the infinite gradient at 0
        if how == "norm":
            return head(positive / (1 + (positive[:, :1] * 0).square().sum(1, keepdim=True).sqrt()))
        return head(positive.sqrt() if how == "sqrt" else positive.pow(0.7))

    setup.forward = forward


def _constant(setup, value):
    for layer in layers_of(setup):
        nn.init.constant_(layer.weight, value)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for module in setup.body.modules():
        if isinstance(module, nn.RNNBase):
            for weight in module.parameters():
                nn.init.constant_(weight, value)


def _eval_mode(setup, when):
    if when == "start":
        setup.at_start = lambda module: module.eval()
    elif when == "body":
        setup.at_start = lambda module: module.body.eval()
    else:
        forward = setup.forward

        def forward_in_eval(body, head, x):
            body.eval()
            return forward(body, head, x)

        setup.forward = forward_in_eval


def _scheduler(name, interval, length):
    def schedule(optimizer, steps, epochs):
        count = length(steps, epochs)
        schedulers = torch.optim.lr_scheduler
        if name == "cosine":
            scheduler = schedulers.CosineAnnealingLR(optimizer, count)
        elif name == "polynomial":
            scheduler = schedulers.PolynomialLR(optimizer, count, power=1.0)
        else:
            scheduler = schedulers.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=count)
        return {"scheduler": scheduler, "interval": interval}

    return schedule


def _too_short(setup, name):
    setup.schedule = _scheduler(name, "step", lambda steps, epochs: epochs)


def _too_long(setup, name):
    setup.schedule = _scheduler(name, "epoch", lambda steps, epochs: steps)


def _warmup_by_epoch(setup, warmup):
    def schedule(optimizer, steps, epochs):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / warmup))
        return {"scheduler": scheduler, "interval": "epoch"}

    setup.schedule = schedule


def _stepped_twice(setup, name):
    length = (lambda steps, epochs: 2 * steps + 8) if name == "onecycle" else (lambda steps, epochs: steps)
    setup.schedule, setup.steps_scheduler = _scheduler(name, "step", length), True


def _never_stepped(setup, name):
    setup.schedule, setup.manual = _scheduler(name, "step", lambda steps, epochs: steps), True


def _average_too_long(setup, decay):
    setup.callbacks.append(ok.WeightAveraging(ok.EMA(decay)))


def _has_modes(setup):
    return any(isinstance(m, nn.Dropout | nn.BatchNorm2d) and getattr(m, "p", 1) > 0 for m in setup.body.modules())


def _is_classes(setup):
    return setup.kind == "classes"


def _passes_nan(setup):
    """A ReLU at the end of the body would stop the gradient, which is NaN where it is 0."""
    return setup.family in ("tanh_mlp", "wine", "tabular", "residual", "autoencoder")


_LENGTHS = ("cosine", "polynomial", "onecycle")

EXACT = (
    Fault("detached_body", frozenset({"no_gradient"}), ("detach", "no_grad", "data"), _detached, has_body),
    Fault("missing_parameters", frozenset({"not_optimized"}), ("first", "body", "head"), _missing, has_body),
    Fault("not_zeroed", frozenset({"gradient_not_zeroed"}), ("automatic", "manual", "accumulating"), _not_zeroed),
    Fault("bf16_weights", frozenset({"lost_updates"}), (0.03, 0.01, 0.003), _lost, has_body),
    Fault("nan_in_batch", frozenset({"nonfinite"}), (1, 10, 100), _nan_in_batch, lambda s: s.family != "embedding"),
    # The scores are no probabilities either, which was added when that symptom was.
    Fault(
        "log_of_zero", frozenset({"nonfinite", "loss_does_not_match_output"}), ("relu6", "relu", "square"),
        _log_of_zero, _is_classes,
    ),
    Fault("root_of_zero", frozenset({"nonfinite"}), ("power", "norm", "sqrt"), _root_of_zero, _passes_nan),
    Fault(
        "constant_init", frozenset({"symmetric_init"}), (0.05, 0.01, 0.0), _constant,
        lambda s: has_body(s) and s.family not in ("transformer", "embedding", "residual", "tabular"),
    ),
    Fault("eval_mode", frozenset({"wrong_mode"}), ("start", "body", "forward"), _eval_mode, _has_modes),
    Fault("schedule_too_short", frozenset({"schedule_fault"}), ("cosine", "polynomial"), _too_short),
    Fault("schedule_too_long", frozenset({"schedule_fault"}), _LENGTHS, _too_long),
    Fault("warmup_by_epoch", frozenset({"schedule_fault"}), (10, 30, 100), _warmup_by_epoch),
    Fault("stepped_twice", frozenset({"schedule_fault"}), _LENGTHS, _stepped_twice),
    Fault("never_stepped", frozenset({"schedule_fault"}), _LENGTHS, _never_stepped),
    Fault("average_too_long", frozenset({"average_not_ready"}), (0.999, 0.9995, 0.9999), _average_too_long),
)  # fmt: skip
