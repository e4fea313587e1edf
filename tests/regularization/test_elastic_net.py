# SPDX-License-Identifier: Apache-2.0
"""The penalties by hand and by their gradients."""

import pytest
import torch

from lightning_optkit.regularization import elastic_net, l1_penalty, l2_penalty

PARAMS = [torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([[0.0, 3.0]], requires_grad=True)]
COMPLEX = [torch.tensor([3.0 + 4.0j])]


def gradients(penalty):
    return torch.autograd.grad(penalty, PARAMS)


def test_l1_is_the_sum_of_absolute_values():
    assert l1_penalty(PARAMS, 0.5).item() == 3.0
    assert [g.tolist() for g in gradients(l1_penalty(PARAMS, 0.5))] == [[0.5, -0.5], [[0.0, 0.5]]]
    assert l1_penalty(COMPLEX).item() == 5.0


def test_l2_is_half_the_sum_of_squares_and_its_gradient_the_parameter():
    assert l2_penalty(PARAMS, 0.5).item() == 3.5
    assert [g.tolist() for g in gradients(l2_penalty(PARAMS, 0.5))] == [[0.5, -1.0], [[0.0, 1.5]]]
    assert l2_penalty(COMPLEX).item() == 12.5


def test_elastic_net_is_their_sum():
    assert elastic_net(iter(PARAMS), 0.5, 0.5).item() == 6.5
    assert elastic_net(PARAMS, 0.5, 0.0).item() == 3.0


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (l1_penalty, (PARAMS, -1.0), r"^l1_penalty\(strength=-1\.0\): strength must be in \[0, inf\)\.$"),
        (l2_penalty, (PARAMS, float("nan")), r"^l2_penalty\(strength=nan\): strength must be in \[0, inf\)\.$"),
        (elastic_net, (PARAMS, -1.0, 0.0), r"^elastic_net\(l1=-1\.0\): l1 must be in \[0, inf\)\.$"),
        (elastic_net, (PARAMS, 0.0, -1.0), r"^elastic_net\(l2=-1\.0\): l2 must be in \[0, inf\)\.$"),
        (l1_penalty, ([],), r"^l1_penalty\(params=\[\]\): params must hold at least one parameter\.$"),
        (l2_penalty, ([],), r"^l2_penalty\(params=\[\]\): params must hold at least one parameter\.$"),
        (elastic_net, ([], 1.0, 1.0), r"^elastic_net\(params=\[\]\): params must hold at least one parameter\.$"),
    ],
)
def test_bad_input_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
