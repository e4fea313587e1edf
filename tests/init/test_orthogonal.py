# SPDX-License-Identifier: Apache-2.0
"""orthogonal against torch.nn.init, bit for bit, and orthogonality in every dtype."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import orthogonal

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}  # a few units in the last place


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 4, 3, 3)], ids=str)
def test_equals_torch(shape, activation):
    reference = torch.empty(shape)
    nn.init.orthogonal_(reference, nn.init.calculate_gain(activation), generator=torch.Generator().manual_seed(3))
    ours = orthogonal(torch.empty(shape), activation=activation, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ours, reference)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_are_orthonormal(dtype):
    weight = orthogonal(torch.empty(4, 10, dtype=dtype), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(weight @ weight.T, torch.eye(4).double(), rtol=0, atol=TOLERANCE[dtype])


def test_rejects_a_vector():
    with pytest.raises(
        ValueError, match=r"orthogonal\(tensor of shape \(3,\)\): tensor must have at least 2 dimensions"
    ):
        orthogonal(torch.empty(3))
