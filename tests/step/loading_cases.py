# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of state dicts: an optimizer of two groups, and its steps."""

import torch


def two_groups(optimizer_class, dtype=torch.float64, **kwargs):
    """Parameters of fixed values in two groups; the last of them never has a gradient."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in (3, 5, 2)]
    groups = [dict(params=params[:1], weight_decay=0.01), dict(params=params[1:])]
    return optimizer_class(groups, **kwargs), params


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params[:-1]:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def steps(optimizer, params, seeds):
    for seed in seeds:
        give_gradients(params, seed)
        optimizer.step()
