# SPDX-License-Identifier: Apache-2.0
"""GhostBatchNorm1d: torch's BatchNorm per ghost batch, statistics updated once per batch."""

import pytest
import torch
from torch import nn

from lightning_optkit.layers import GhostBatchNorm1d

SPLITS = [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (9, 4, [4, 5]), (3, 4, [3])]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("samples, size, parts", SPLITS)
def test_numbers_and_statistics_are_the_written_out_ones(samples, size, parts, momentum):
    layer = GhostBatchNorm1d(3, momentum=momentum, ghost_batch_size=size).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    mean, variance = torch.zeros(3).double(), torch.ones(3).double()
    for step in (1, 2):
        x = torch.randn(samples, 3, dtype=torch.float64) * 2 + 1
        y, split = layer(x), x.split(parts)
        expected = [(p - p.mean(0)) / (p.var(0, unbiased=False) + layer.eps).sqrt() for p in split]
        torch.testing.assert_close(y, torch.cat(expected) * layer.weight + layer.bias)
        factor = 1 / step if momentum is None else momentum
        part_means = sum(p.mean(0) * len(p) for p in split) / samples
        part_variances = sum(p.var(0) * len(p) for p in split) / samples
        mean, variance = mean + factor * (part_means - mean), variance + factor * (part_variances - variance)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, variance)
    assert int(layer.num_batches_tracked) == 2


def test_eval_and_state_dict_are_torchs():
    layer, torchs = GhostBatchNorm1d(3, ghost_batch_size=2), nn.BatchNorm1d(3)
    layer(torch.randn(8, 3) + 2)
    torchs.load_state_dict(layer.state_dict())
    x, before = torch.randn(5, 3), layer.running_mean.clone()
    assert torch.equal(layer.eval()(x), torchs.eval()(x)) and torch.equal(layer.running_mean, before)
    layer.load_state_dict(nn.BatchNorm1d(3).state_dict())


def test_without_running_statistics_eval_uses_the_batch_as_torch_does():
    layer, torchs = (make(3, track_running_stats=False).eval() for make in (GhostBatchNorm1d, nn.BatchNorm1d))
    x = torch.randn(300, 3)
    torch.testing.assert_close(layer(x), torchs(x))
    assert layer.train()(x).shape == x.shape


def test_sequences_gradcheck_and_compile():
    layer = GhostBatchNorm1d(2, ghost_batch_size=2, track_running_stats=False).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))
    tracked = GhostBatchNorm1d(2, ghost_batch_size=2).double()
    y = torch.compile(tracked, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    assert int(tracked.num_batches_tracked) == 1


def test_conversion_to_sync_batch_norm_replaces_it_as_its_docstring_says():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(GhostBatchNorm1d(3, ghost_batch_size=2)))
    assert type(converted[0]) is nn.SyncBatchNorm and "replaces it by `SyncBatchNorm`" in GhostBatchNorm1d.__doc__


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"GhostBatchNorm1d\(ghost_batch_size=0\): ghost_batch_size must be an int"):
        GhostBatchNorm1d(3, ghost_batch_size=0)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        GhostBatchNorm1d(3, ghost_batch_size=1)(torch.ones(4, 3))
