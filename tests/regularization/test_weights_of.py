# SPDX-License-Identifier: Apache-2.0
"""Which parameters count as weights."""

from torch import nn

from lightning_optkit.regularization import weights_of


def test_biases_norms_and_frozen_parameters_are_left_out():
    net = nn.ModuleDict(
        dict(
            conv=nn.Conv2d(1, 2, 3),
            batch=nn.BatchNorm2d(2),
            layer=nn.LayerNorm([2, 3]),
            prelu=nn.PReLU(),
            frozen=nn.Linear(2, 2).requires_grad_(False),
            lstm=nn.LSTM(2, 2),
        )
    )
    net["again"] = net["conv"]
    assert list(weights_of(net)) == ["conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]
