# SPDX-License-Identifier: Apache-2.0
"""DropBlock2d: squares, as many as in equation 1, and the scale of the rest."""

import pytest
import torch

from lightning_optkit.layers import DropBlock2d


@pytest.mark.parametrize("shape", [(9, 9), (7, 12)])
@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 50])
def test_every_dropped_number_lies_in_a_dropped_square(block_size, shape):
    torch.manual_seed(0)
    y = DropBlock2d(0.2, block_size)(torch.ones(8, 4, *shape))
    side = min(block_size, *shape)
    dropped = (y == 0).float()
    # A square is dropped whole where its mean is 1; every dropped number must be in such a one.
    whole = (torch.nn.functional.avg_pool2d(dropped, side, stride=1) > 0.999).float()
    covered = torch.nn.functional.conv_transpose2d(whole.flatten(0, 1)[:, None], torch.ones(1, 1, side, side)) > 0
    assert dropped.any() and torch.equal(covered.view_as(y), dropped.bool())


def test_the_number_of_seeds_is_that_of_equation_1():
    torch.manual_seed(0)
    p, side, size, n = 0.1, 3, 10, 40000
    y = DropBlock2d(p, side)(torch.ones(n, 1, size, size))
    gamma = p * size**2 / side**2 / (size - side + 1) ** 2
    # A corner is dropped only by the one square that lies in it.
    assert float((y[:, 0, 0, 0] == 0).float().mean()) == pytest.approx(gamma, abs=0.0035)
    # In the middle any of nine seeds drops it.
    assert float((y[:, 0, 5, 5] == 0).float().mean()) == pytest.approx(1 - (1 - gamma) ** 9, abs=0.009)


def test_what_is_left_is_scaled_to_the_number_of_all():
    torch.manual_seed(0)
    y = DropBlock2d(0.3, 3)(torch.ones(4, 4, 9, 9, dtype=torch.float64))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], y.numel() / int(kept.sum())))


def test_identity_in_eval_and_at_zero():
    x = torch.randn(2, 3, 8, 8)
    layer = DropBlock2d(0.5, 3)
    assert DropBlock2d(0.0)(x) is x and layer.eval()(x) is x


def test_seeds_reproduce_in_bf16_and_dtype_stays():
    x = torch.randn(2, 3, 8, 8).bfloat16()
    torch.manual_seed(1)
    y = DropBlock2d(0.3, 3)(x)
    torch.manual_seed(1)
    assert y.dtype == torch.bfloat16 and torch.equal(DropBlock2d(0.3, 3)(x), y)


def test_gradcheck():
    def seeded(x):
        torch.manual_seed(0)
        return DropBlock2d(0.3, 2)(x)

    assert torch.autograd.gradcheck(seeded, torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True))


def test_compiles_without_a_graph_break():
    y = torch.compile(DropBlock2d(0.3, 3), fullgraph=True, backend="aot_eager")(torch.ones(4, 4, 9, 9))
    assert float(y.sum()) == pytest.approx(y.numel(), rel=1e-4) and (y == 0).any()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"DropBlock2d\(p=1\): p must be in \[0, 1\)"):
        DropBlock2d(1)
    with pytest.raises(ValueError, match=r"DropBlock2d\(block_size=0\): block_size must be an integer >= 1"):
        DropBlock2d(block_size=0)
    with pytest.raises(ValueError, match=r"DropBlock2d\(x.shape=\(3, 8, 8\)\): x must have the dimensions"):
        DropBlock2d()(torch.ones(3, 8, 8))
