# SPDX-License-Identifier: Apache-2.0
"""Tests specific to LayerNorm; the others are in test_norms.py."""

import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.layers import LayerNorm


def test_torch_stops_counting_at_256_in_bfloat16_and_we_do_not(threads):
    threads(1)  # each thread of torch counts to 256
    x = torch.randn(4096, 8, dtype=torch.bfloat16)
    ones = torch.ones_like(x)
    found = []
    for module in (nn.LayerNorm(8, dtype=torch.bfloat16), LayerNorm(8, dtype=torch.bfloat16)):
        module(x).backward(ones)
        found.append(module.bias.grad)
    assert (found[0] == 256).all()  # the defect: torch 2.13 sums in bfloat16
    assert (found[1] == 4096).all()


def test_without_the_node_small_inputs_take_the_kernel_of_torch_by_shape_alone(monkeypatch):
    from lightning_optkit.layers._dispatch import SMALL_LAYER, SMALL_ROWS, _is_small

    monkeypatch.setattr("lightning_optkit.layers._dispatch.node", None)
    assert _is_small(torch.empty(7, 64), (64,), SMALL_LAYER)
    assert not _is_small(torch.empty(SMALL_ROWS + 1, 64), (64,), SMALL_LAYER)
    assert not _is_small(torch.empty(8, 8192), (8192,), SMALL_LAYER)
    torch.testing.assert_close(LayerNorm(64)(torch.ones(7, 64)), torch.zeros(7, 64))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_computed_or_lent(always_ours):
    """Parametrized, and given by `functional_call`: then it is no parameter of the module's own."""
    x, module = torch.randn(5, 40), LayerNorm(40)
    torch.nn.init.normal_(module.weight)
    expected = F.layer_norm(x, (40,), 2 * module.weight, module.bias)
    lent = torch.func.functional_call(module, {"weight": 2 * module.weight}, (x,))
    torch.testing.assert_close(lent, expected)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert module.parametrizations.weight.original.grad is not None
