# SPDX-License-Identifier: Apache-2.0
"""Grokfast against its formula, under a loss scale, and in narrow precision."""

import pytest
import torch

from lightning_optkit.regularization import grokfast_


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_it_follows_the_formula_over_200_steps(dtype, tolerance, scale):
    torch.manual_seed(0)
    gradients = torch.randn(200, 3, 5, dtype=dtype)
    averages, expected = [None], None
    for g in gradients:
        grad = g * scale
        averages = grokfast_([grad], averages, alpha=0.9, lamb=1.5, scale=scale)
        expected = g.double() if expected is None else 0.9 * expected + 0.1 * g.double()
        torch.testing.assert_close(averages[0].double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(grad.double() / scale, g.double() + 1.5 * expected, rtol=0, atol=tolerance)


def test_averages_of_half_precision_gradients_are_in_single_precision():
    averages = [torch.ones(1)]
    for _ in range(50):
        averages = grokfast_([torch.tensor([1.0 + 2**-7]).bfloat16()], averages, alpha=0.99)
    assert averages[0].dtype == torch.float32 and 1 + 2**-9 < averages[0].item() < 1 + 2**-8


def test_averages_are_not_written_to_so_that_a_step_may_be_skipped():
    before = torch.ones(2)
    grokfast_([torch.full((2,), float("inf"))], [before])
    assert before.tolist() == [1.0, 1.0]


def test_bad_arguments_are_refused():
    for given, message in (
        (dict(alpha=1.0), r"alpha=1\.0\): alpha must be in \[0, 1\)"),
        (dict(lamb=-1.0), r"lamb=-1\.0\): lamb must be in \[0, inf\)"),
        (dict(lamb=1e308), r"lamb=1e\+308\): lamb must be a number that fp32 can hold"),
        (dict(scale=0.0), r"scale=0\.0\): scale must be in \(0, inf\)"),
        (dict(averages=[]), r"averages=<0>\): there must be one of the shape of each of grads"),
    ):
        with pytest.raises(ValueError, match=rf"^grokfast_\({message}\.$"):
            grokfast_(**{**dict(grads=[torch.ones(2)], averages=[None]), **given})
