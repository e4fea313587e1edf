# SPDX-License-Identifier: Apache-2.0
"""Optimizers are called by the modules whose parameters they hold."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_optkit.callbacks.seams.optimizer_names import optimizer_names


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.ones(1))


NET = Net()


@pytest.mark.parametrize(
    ("held", "names"),
    [
        ([NET], ["optimizer 0"]),
        ([NET.body, NET.head], ["body", "head"]),
        ([NET.body[1:], NET.body[0]], ["body.1, body.2", "body.0"]),
        ([nn.ModuleList([NET.body[0], NET.body[2], NET.head])], ["body.0 to head"]),
        ([NET.head, NET.head], ["optimizer 0, head", "optimizer 1, head"]),
        ([nn.ParameterList([NET.scale, NET.head.bias])], ["head.bias, scale"]),
        ([nn.Linear(1, 1)], ["optimizer 0"]),
    ],
)
def test_the_name_is_that_of_the_modules(held, names):
    optimizers = [torch.optim.SGD([*each.parameters()], lr=0.1) for each in held]
    assert optimizer_names(SimpleNamespace(optimizers=optimizers, lightning_module=NET)) == names
