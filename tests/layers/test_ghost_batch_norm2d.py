# SPDX-License-Identifier: Apache-2.0
"""GhostBatchNorm2d on images; what it shares with one dimension is tested in test_ghost_batch_norm1d."""

import pytest
import torch
from torch import nn

from lightning_optkit.layers import GhostBatchNorm2d


def test_every_ghost_batch_is_torchs_batch_norm_and_one_of_one_image_too():
    x = torch.randn(9, 3, 4, 4, dtype=torch.float64)
    layer, torchs = GhostBatchNorm2d(3, ghost_batch_size=4).double(), nn.BatchNorm2d(3).double()
    expected = torch.cat([torchs(part) for part in (x[:4], x[4:8], x[8:])])
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_ghost_batch_is_torchs_batch_norm_with_its_statistics(memory_format):
    x = torch.randn(6, 3, 4, 4).contiguous(memory_format=memory_format)
    layer, torchs = GhostBatchNorm2d(3, ghost_batch_size=6), nn.BatchNorm2d(3)
    torch.testing.assert_close(layer(x), torchs(x))
    torch.testing.assert_close(layer.state_dict(), torchs.state_dict())


def test_bf16_with_float32_statistics():
    x = torch.randn(8, 3, 4, 4)
    layer, wide = GhostBatchNorm2d(3, ghost_batch_size=4), GhostBatchNorm2d(3, ghost_batch_size=4)
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16 and layer.running_var.dtype == torch.float32
    torch.testing.assert_close(y.float(), wide(x), rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer.running_var, wide.running_var, rtol=0.01, atol=0.01)


def test_wrong_dimensions_are_refused_as_torch_does():
    with pytest.raises(ValueError, match="expected 4D input"):
        GhostBatchNorm2d(3)(torch.ones(2, 3))
