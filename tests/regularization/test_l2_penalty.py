# SPDX-License-Identifier: Apache-2.0
"""L2 in the loss is torch's weight decay under SGD, and is not decoupled decay under Adam."""

import torch

from lightning_optkit.regularization import l2_penalty


def trained(optimizer_class, penalty, **arguments):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, generator=generator).requires_grad_()
    optimizer = optimizer_class([weight], lr=0.1, **arguments)
    for _ in range(10):
        optimizer.zero_grad()
        loss = (torch.randn(5, generator=generator) * weight).sum() + l2_penalty([weight], penalty)
        loss.backward()
        optimizer.step()
    return weight.detach()


def test_under_sgd_and_adam_it_is_their_weight_decay():
    for optimizer_class in (torch.optim.SGD, torch.optim.Adam):
        torch.testing.assert_close(trained(optimizer_class, 0.3), trained(optimizer_class, 0.0, weight_decay=0.3))


def test_under_adam_it_is_not_decoupled_decay():
    in_the_loss, decoupled = trained(torch.optim.Adam, 0.3), trained(torch.optim.AdamW, 0.0, weight_decay=0.3)
    assert (in_the_loss - decoupled).abs().max() > 0.1
