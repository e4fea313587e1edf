# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of conversions: torch's rules and schedulers, and the same gradients for every run."""

import torch
from torch.optim import lr_scheduler

from lightning_optkit.optimizers import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, RAdam, RMSprop

SHAPES = [(), (7,), (16, 33)]
NUM_STEPS = 12
RULES = {
    "sgd": (SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "adam": (Adam, torch.optim.Adam, dict(lr=0.05, weight_decay=0.1)),
    "adamw": (AdamW, torch.optim.AdamW, dict(lr=0.05, amsgrad=True)),
    "adafactor": (Adafactor, torch.optim.Adafactor, dict(lr=0.05, weight_decay=0.1)),
    "nadam": (NAdam, torch.optim.NAdam, dict(lr=0.05, weight_decay=0.1)),
    "adagrad": (Adagrad, torch.optim.Adagrad, dict(lr=0.05, lr_decay=0.1)),
    "rmsprop": (RMSprop, torch.optim.RMSprop, dict(lr=0.05, momentum=0.9, centered=True, eps=1e-3)),
    "adadelta": (Adadelta, torch.optim.Adadelta, dict(lr=0.5, weight_decay=0.1)),
    "adamax": (Adamax, torch.optim.Adamax, dict(lr=0.05, weight_decay=0.1)),
    "radam": (RAdam, torch.optim.RAdam, dict(lr=0.05, weight_decay=0.1)),
}


def has_momentum(optimizer):
    return not {"momentum", "betas"}.isdisjoint(optimizer.defaults)


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 7]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=NUM_STEPS),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=NUM_STEPS),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=NUM_STEPS + 1, cycle_momentum=has_momentum(o)
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=has_momentum(o)
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=5), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in SHAPES]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, steps, scheduler=None):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def built(rule, dtype=torch.float64, **kwargs):
    _, _torch_class, rule_kwargs = RULES[rule]
    params = parameters(dtype)
    return _torch_class(params, **{**rule_kwargs, **kwargs}), params


def without_params(groups):
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]
