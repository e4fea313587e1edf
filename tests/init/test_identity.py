# SPDX-License-Identifier: Apache-2.0
"""identity: layers that pass their input through."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import identity, initialize


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3)], ids=str)
def test_a_matrix_is_the_scaled_identity(shape):
    assert torch.equal(identity(torch.empty(shape), scale=0.5), 0.5 * torch.eye(*shape))


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 4, 3, padding=1), (2, 4, 9)),
        (nn.Conv2d(6, 6, 3, padding=1, groups=3), (2, 6, 5, 5)),
        (nn.Conv3d(2, 2, 3, padding=1), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2), (2, 6, 5, 5)),
        (nn.Linear(7, 7), (3, 7)),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_layer_returns_its_input(layer, size):
    initialize(layer, identity)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x)


def test_a_recurrent_network_keeps_its_state():
    rnn = nn.RNN(3, 5, nonlinearity="relu")
    initialize(rnn, identity, recurrent=identity)
    state = torch.rand(1, 2, 5, generator=torch.Generator().manual_seed(0))
    _, last = rnn(torch.zeros(20, 2, 3), state)
    torch.testing.assert_close(last, state)


def test_rejects_six_dimensions():
    with pytest.raises(
        ValueError, match=r"identity\(tensor of shape \(1, 1, 1, 1, 1, 1\)\): tensor must have 2 to 5 dim"
    ):
        identity(torch.empty(1, 1, 1, 1, 1, 1))


def test_rejects_an_infinite_scale():
    with pytest.raises(ValueError, match=r"identity\(scale=inf\): scale must be in \(-inf, inf\)\."):
        identity(torch.empty(2, 2), scale=float("inf"))
