# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of what changes between steps, or during one: optimizers with state of several kinds."""

import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import LAMB, LARS, SGD, Adafactor, AdamW, Lion, NAdam, Prodigy, ScheduleFreeAdamW


def training(optimizer):
    optimizer.train()
    return optimizer


BUILDS = {
    "AdamW": lambda p, **kw: AdamW(p, lr=0.1, **kw),
    "AdamW amsgrad, clip, EMA": lambda p, **kw: AdamW(
        p, lr=0.1, amsgrad=True, clip=ClipNorm(1.0), average=EMA(0.9), statistics=True, **kw
    ),
    "SGD momentum, Kahan": lambda p, **kw: SGD(p, lr=0.1, momentum=0.9, rounding="kahan", **kw),
    "Lion bf16 state": lambda p, **kw: Lion(p, lr=0.1, state_dtype=torch.bfloat16, **kw),
    "AdamW int8 state": lambda p, **kw: AdamW(p, lr=0.1, state_dtype="int8", **kw),
    "NAdam, units": lambda p, **kw: NAdam(p, lr=0.1, clip=ClipUnitwise(0.1), centralize=True, **kw),
    "LAMB": lambda p, **kw: LAMB(p, lr=0.1, **kw),
    "LARS, tensors": lambda p, **kw: LARS(p, lr=0.1, clip=ClipPerTensor(0.5), **kw),
    "Adafactor": lambda p, fused=None, **kw: Adafactor(p, lr=0.1, **kw),
    "Prodigy": lambda p, **kw: Prodigy(p, **kw),
    "ScheduleFreeAdamW": lambda p, **kw: training(ScheduleFreeAdamW(p, lr=0.1, **kw)),
}


def steps(optimizer, params, numbers, move=lambda: None):
    """Steps of fixed gradients; `move` before each but the first."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        if number:
            move()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
