# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of split weights: the same numbers in bf16 with a correction and in fp32."""

import torch

from lightning_optkit.step.split_weights import join

ROUNDINGS = ["kahan", "split24", "split32"]


def joined(optimizer, param):
    state = optimizer.state[param]
    return join(param, state["correction16"] if "correction16" in state else state["correction8"])


def pair(cls, kwargs, shape=(40, 19), rounding="split32"):
    """The same numbers in bf16 with a correction and in fp32, each with its optimizer."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    split, whole = start.clone().requires_grad_(), start.float().requires_grad_()
    return split, cls([split], rounding=rounding, **kwargs), whole, cls([whole], **kwargs)


def step_together(split, one, whole, other, steps, seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        grad = scale * torch.randn(split.shape, generator=generator)
        split.grad = grad.bfloat16()
        whole.grad = split.grad.float()
        one.step()
        other.step()
