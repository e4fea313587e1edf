# SPDX-License-Identifier: Apache-2.0
"""Smoothed targets against torch's own `label_smoothing`, and by hand."""

import pytest
import torch
import torch.nn.functional as F

from lightning_optkit.regularization import label_smoothing

LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_given_to_cross_entropy_they_are_worth_its_own_smoothing(smoothing, reduction):
    soft = label_smoothing(TARGET, smoothing, num_classes=4)
    actual = F.cross_entropy(LOGITS, soft, reduction=reduction)
    expected = F.cross_entropy(LOGITS, TARGET, reduction=reduction, label_smoothing=smoothing)
    torch.testing.assert_close(actual, expected)
    again = label_smoothing(F.one_hot(TARGET, 4).double(), smoothing)
    assert again.dtype == torch.float64
    torch.testing.assert_close(again, soft.double(), rtol=0, atol=1e-7)


def test_a_yes_or_no_moves_toward_a_half():
    answers = torch.tensor([[1.0, 0.0, 0.5]])
    torch.testing.assert_close(label_smoothing(answers, 0.2, num_classes=1), torch.tensor([[0.9, 0.1, 0.5]]))


def test_targets_of_any_shape():
    assert label_smoothing(TARGET[:4].view(2, 2), 0.1, num_classes=4).shape == (2, 2, 4)
    assert label_smoothing(torch.zeros(0, dtype=torch.long), 0.1, num_classes=4).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(target=TARGET, smoothing=1.0, num_classes=4), r"\(smoothing=1\.0\): smoothing must be in \[0, 1\)\.$"),
        (dict(target=TARGET, smoothing=-0.1, num_classes=4), r"\(smoothing=-0\.1\): smoothing must be in \[0, 1\)\.$"),
        (dict(target=TARGET), r"\(num_classes=None\): class indices need num_classes, at least 2\.$"),
        (dict(target=TARGET, num_classes=1), r"\(num_classes=1\): class indices need num_classes, at least 2\.$"),
        (dict(target=TARGET, num_classes=3), r"\(target=3\): class indices must be in \[0, 3\)\.$"),
        (dict(target=-TARGET, num_classes=4), r"\(target=-3\): class indices must be in \[0, 4\)\.$"),
        (dict(target=torch.tensor([0.5, 1.5])), r"\(target=1\.5\): probabilities must be in \[0, 1\]\.$"),
        (dict(target=torch.tensor([-0.5, 0.5])), r"\(target=-0\.5\): probabilities must be in \[0, 1\]\.$"),
        (dict(target=torch.tensor([0.5, torch.nan])), r"\(target=nan\): probabilities must be in \[0, 1\]\.$"),
        (dict(target=torch.rand(2, 3), num_classes=4), r"\(num_classes=4\): target has 3 classes\.$"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=r"^label_smoothing" + message):
        label_smoothing(**arguments)


def test_targets_must_be_a_tensor():
    with pytest.raises(TypeError, match=r"^label_smoothing\(target=list\): target must be a real tensor\.$"):
        label_smoothing([0, 1], num_classes=2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 3, 2)], ids=str)
def test_with_class_weights_the_mean_divides_as_torchs_does(shape, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape[0], 4, *shape[1:], generator=generator, dtype=torch.float64)
    target = torch.randint(4, shape, generator=generator)
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
    soft = label_smoothing(target, smoothing, num_classes=4, weight=weight)
    actual = F.cross_entropy(logits, soft.movedim(-1, 1), weight=weight)
    expected = F.cross_entropy(logits, target, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    without = F.cross_entropy(logits, label_smoothing(target, smoothing, 4).movedim(-1, 1).double(), weight=weight)
    assert not torch.isclose(without, expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(target=TARGET, num_classes=4, weight=torch.ones(3)),
            r"\(weight\.shape=\(3,\)\): weight must be \(4,\)\.$",
        ),
        (dict(target=torch.rand(2, 3), weight=torch.ones(3)), r"\(weight=<Tensor>\): weight must be None for probab"),
    ],
)
def test_weights_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=r"^label_smoothing" + message):
        label_smoothing(**arguments)
