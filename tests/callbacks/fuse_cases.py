# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of Fuse: optimizers in two groups, clips, precisions, and comparisons with a run without it."""

import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import lr_scheduler

from lightning_optkit.step import OnePassOptimizer

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "plain sgd": (torch.optim.SGD, dict(lr=0.1)),
    "adam": (torch.optim.Adam, dict(lr=0.02)),
    "adamw": (torch.optim.AdamW, dict(lr=0.02, amsgrad=True)),
    "adafactor": (torch.optim.Adafactor, dict(lr=0.02)),
}
TOLERANCE = 1e-6  # six steps on numbers of size 1 in fp32


class Peek(Callback):
    """The classes of the optimizers during the fit, and whether unscaling is part of their step."""

    def __init__(self):
        self.are_one_pass, self.fold_unscaling = set(), set()

    def on_train_batch_start(self, trainer, *_):
        for optimizer in trainer.optimizers:
            self.are_one_pass.add(isinstance(optimizer, OnePassOptimizer))
            self.fold_unscaling.add(getattr(optimizer, "_step_supports_amp_scaling", False))


def configured(name="adamw", **more):
    """Weights and biases in two groups, each with its own lr and decay."""
    optimizer_class, kwargs = OPTIMIZERS[name]

    def configure(module):
        weights = [p for p in module.parameters() if p.dim() > 1]
        biases = [p for p in module.parameters() if p.dim() == 1]
        groups = [dict(params=weights, weight_decay=0.1), dict(params=biases, lr=0.05, weight_decay=0.0)]
        return optimizer_class(groups, **{**kwargs, **more})

    return configure


def assert_close(module, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=tolerance)


def assert_equal(module, expected):
    assert_close(module, expected, tolerance=0)


def assert_moments_close(trainer, expected, tolerance=TOLERANCE):
    """Every state tensor that torch keeps, and its step counters; ours counts the steps of SGD as well."""
    states, expected_states = (t.optimizers[0].state_dict()["state"] for t in (trainer, expected))
    for key, state in expected_states.items():
        kept = {name: states[key][name] for name in state}
        torch.testing.assert_close(kept, state, rtol=0, atol=tolerance)


class Watcher(Callback):
    """Records the gradients before every step, and the lr of every group."""

    def __init__(self):
        self.grads, self.lrs = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append([p.grad.clone() for p in pl_module.parameters()])
        self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])


def step_lr(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)


FORMS = {
    "optimizer": lambda o: o,
    "list": lambda o: [o],
    "tuple": lambda o: (o,),
    "two lists": lambda o: ([o], [step_lr(o)]),
    "two lists with a config": lambda o: ([o], [{"scheduler": step_lr(o), "interval": "step"}]),
    "dict": lambda o: {"optimizer": o},
    "dict with a scheduler": lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)},
    "dict with a config": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), "interval": "step"}},
    "one cycle": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": one_cycle(o), "interval": "step"}},
    "plateau": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0), "monitor": "train_loss"},
    },
}


def keys_after_a_plain_fit(regression, fit):
    module = regression(configured())
    fit(module)
    return set(vars(module))
