# SPDX-License-Identifier: Apache-2.0
"""sparse against torch.nn.init, bit for bit with the global generator, and its own promise with another."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import sparse


def test_equals_torch_with_the_global_generator():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        reference = nn.init.sparse_(torch.empty(20, 6), 0.7, 0.1)
        torch.manual_seed(5)
        assert torch.equal(sparse(torch.empty(20, 6), sparsity=0.7, std=0.1), reference)


def test_an_explicit_generator_decides_everything_and_nothing_else_is_disturbed():
    first = sparse(torch.empty(20, 6), generator=torch.Generator().manual_seed(1))
    torch.rand(3)  # moves the global generator, from which torch draws the places of the zeros
    before = torch.get_rng_state()
    second = sparse(torch.empty(20, 6), generator=torch.Generator().manual_seed(1))
    other = sparse(torch.empty(20, 6), generator=torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first == 0, other == 0)


def test_each_column_of_a_convolution_has_its_share_of_zeros():
    weight = sparse(torch.empty(10, 4, 3, 3), sparsity=0.8, generator=torch.Generator().manual_seed(0))
    assert (weight.flatten(1) == 0).sum(dim=0).tolist() == [8] * 36


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_rejects_a_share_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=rf"sparse\(sparsity={sparsity}\): sparsity must be in \[0, 1\)\."):
        sparse(torch.empty(2, 2), sparsity=sparsity)


def test_rejects_a_std_of_zero():
    with pytest.raises(ValueError, match=r"sparse\(std=0\): std must be in \(0, inf\)\."):
        sparse(torch.empty(2, 2), std=0)
