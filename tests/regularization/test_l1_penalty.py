# SPDX-License-Identifier: Apache-2.0
"""L1 in the loss does not produce exact zeros."""

import torch

from lightning_optkit.regularization import l1_penalty, soft_threshold_


def distances_to_zero(proximal):
    """|w| over ten steps of rate 0.1 on the L1 penalty alone, from 0.25."""
    weight = torch.tensor([0.25], requires_grad=True)
    seen = []
    for _ in range(10):
        if proximal:
            soft_threshold_([weight], 0.1)
        else:
            (gradient,) = torch.autograd.grad(l1_penalty([weight]), [weight])
            weight.data -= 0.1 * gradient
        seen.append(float(weight.detach().abs()))
    return seen


def test_gradient_steps_jump_over_zero_and_proximal_steps_stay_there():
    assert min(distances_to_zero(proximal=False)) > 0.04
    assert distances_to_zero(proximal=True)[2:] == [0.0] * 8
