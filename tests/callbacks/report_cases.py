# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of Report: optimizers with a clip, and a Report that writes nothing."""

import torch

from lightning_optkit.callbacks import Report

CLIP = 0.05  # below every norm of this problem
STEPS = [1, 2, 3, 4, 5, 6]


def adamw(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def plain_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def only_record(**kwargs):
    return Report(write=False, **{"measure_every": 1, **kwargs})
