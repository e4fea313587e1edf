# SPDX-License-Identifier: Apache-2.0
"""Mixup against the equations of the paper."""

import pytest
import torch
import torch.nn.functional as F

from lightning_optkit.data import Mixup


def test_inputs_and_targets_are_mixed_alike():
    """Inputs that equal their soft targets must stay equal to them."""
    soft = torch.rand(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        mixed, targets = Mixup(0.5, generator=torch.Generator().manual_seed(seed))(soft, soft)
        torch.testing.assert_close(mixed, targets, rtol=0, atol=0)


def test_follows_the_equations():
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed, targets = Mixup(1.0, num_classes=6)(x, torch.arange(6))
    torch.testing.assert_close(torch.einsum("ij,jchw->ichw", targets, x), mixed)  # targets hold the coefficients
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))


def test_cross_entropy_of_mixed_targets_is_the_mixed_cross_entropy():
    logits, labels = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    mixup = Mixup(1.0, num_classes=3, generator=torch.Generator().manual_seed(5))
    twin = Mixup(1.0, generator=torch.Generator().manual_seed(5))
    _, targets = mixup(logits, labels)
    _, weights = twin(torch.zeros(8, 1), torch.eye(8))
    by_index = torch.stack([F.cross_entropy(logits, labels[[j]].expand(8), reduction="none") for j in range(8)], dim=1)
    expected = (weights * by_index).sum(dim=1)
    torch.testing.assert_close(F.cross_entropy(logits, targets, reduction="none"), expected)
    torch.testing.assert_close(weights @ F.one_hot(labels, 3).float(), targets)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_coefficient_is_beta_distributed(alpha):
    mixup, x = Mixup(alpha), torch.eye(2, dtype=torch.float64)
    shares = torch.stack([mixup(x, x)[1][0] for _ in range(4000)])
    lam = shares[shares[:, 1] > 0][:, 0]  # batches whose shuffle changed something
    expected = torch.distributions.Beta(alpha, alpha)
    assert 1700 < len(lam) < 2300
    assert abs(float(lam.mean()) - 0.5) < 5 * float(expected.stddev) / 1700**0.5
    assert float(lam.var()) == pytest.approx(float(expected.variance), rel=0.1)


@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.tensor([[1, 0], [0, 1]])], ids=["indices", "one-hot"])
def test_indices_and_integer_one_hot_give_the_same_soft_targets(targets):
    _, soft = Mixup(1.0, num_classes=2)(torch.eye(2), targets)
    mixed, expected = Mixup(1.0)(torch.eye(2), torch.eye(2))
    assert soft.dtype == torch.float32 and torch.equal(soft, expected) and torch.equal(mixed, expected)


def test_regression_targets_are_mixed_as_numbers():
    x = torch.tensor([[1.0], [5.0], [9.0]])
    mixed, targets = Mixup(1.0)(x, x[:, 0])
    assert torch.equal(mixed[:, 0], targets)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        (torch.rand(2, 3), torch.tensor([0, 1]), {}, r"Mixup\(num_classes=None\): class indices need num_classes"),
        (torch.rand(2, 3), torch.tensor([0, 7]), {"num_classes": 3}, r"Mixup\(targets=7\): .* must be in \[0, 3\)"),
        (torch.rand(2, 3), torch.tensor([0, -1]), {"num_classes": 3}, r"Mixup\(targets=-1\): .* must be in \[0, 3\)"),
        (torch.rand(2, 3), torch.rand(2, 4), {"num_classes": 3}, r"Mixup\(num_classes=3\): the soft targets have 4"),
        (torch.rand(3, 3), torch.rand(2, 4), {}, r"Mixup\(inputs.shape=\(3, 3\)\): .* for each of the 2 targets"),
        (torch.rand(2, 3), torch.rand(2, 4, 5), {}, r"Mixup\(targets.shape=\(2, 4, 5\)\): targets must be class"),
    ],
)
def test_targets_that_do_not_fit_are_refused(inputs, targets, options, message):
    with pytest.raises(ValueError, match=message):
        Mixup(**options)(inputs, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"Mixup\(alpha=0.0\): alpha must be in \(0, inf\)"),
        ({"num_classes": 0}, r"Mixup\(num_classes=0\): num_classes must be an integer >= 1"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixup(**options)
