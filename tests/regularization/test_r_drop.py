# SPDX-License-Identifier: Apache-2.0
"""The divergence against torch's kl_div, and by its properties."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Bernoulli, kl_divergence

from lightning_optkit.regularization import r_drop

GENERATOR = torch.Generator().manual_seed(0)
A, B = (torch.randn(5, 4, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("dim", [1, 2])
def test_it_is_the_mean_of_both_directions(dim):
    p, q = A.log_softmax(dim), B.log_softmax(dim)
    expected = sum(F.kl_div(x, y, reduction="none", log_target=True).sum(dim) for x, y in ((p, q), (q, p))) / 2
    torch.testing.assert_close(r_drop(A, B, dim=dim, reduction="none"), expected)
    torch.testing.assert_close(r_drop(A, B, dim=dim), expected.mean())
    torch.testing.assert_close(r_drop(p, B, dim=dim, reduction="sum"), expected.sum())


def test_a_yes_or_no_is_a_bernoulli_variable():
    p, q = Bernoulli(logits=A), Bernoulli(logits=B)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)) / 2
    torch.testing.assert_close(r_drop(A, B, binary=True, reduction="none"), expected)


def test_equal_predictions_cost_nothing_and_gradients_reach_both():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert r_drop(a, a.detach()).item() == 0
    r_drop(a, b).backward()
    torch.testing.assert_close(a.grad.sum(1), torch.zeros(5, 3, dtype=torch.float64))
    assert a.grad.abs().max() > 0 and b.grad.abs().max() > 0


def test_16_bits_are_computed_in_32():
    assert r_drop(A.bfloat16(), B.bfloat16()).dtype == torch.float32


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"^r_drop\(other\.shape=\(4, 3\)\): must be that of logits, \(5, 4, 3\)\.$"):
        r_drop(A, B[0])
    with pytest.raises(ValueError, match=r"^r_drop\(reduction='max'\): reduction must be one of 'mean', 'sum', 'none'"):
        r_drop(A, B, reduction="max")
