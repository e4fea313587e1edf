# SPDX-License-Identifier: Apache-2.0
"""The projection onto the ball, per output unit."""

import pytest
import torch

from lightning_optkit.regularization import max_norm_


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("shape", "dim"), [((6, 4), 0), ((6, 4), 1), ((5, 3, 2, 2), 0), ((5, 3, 2, 2), 1)])
def test_every_unit_is_within_the_ball_and_those_inside_did_not_move(shape, dim):
    before, weight = drawn(*shape), drawn(*shape)
    limit = weight.movedim(dim, 0).flatten(1).norm(dim=1).mean()
    max_norm_([weight], float(limit), dim)
    rows_before, rows = (w.movedim(dim, 0).flatten(1) for w in (before, weight))
    norms = rows_before.norm(dim=1)
    out = norms > limit
    assert 0 < out.sum() < len(out)
    assert torch.equal(rows[~out], rows_before[~out])
    torch.testing.assert_close(rows[out], rows_before[out] * (limit / norms[out])[:, None])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e22, 1e30])
def test_any_scale_of_weights_and_of_the_ball(scale):
    weight = drawn(4, 300) * scale * torch.tensor([[1.0], [0.1], [10.0], [0.0]])
    expected = weight.double() * (3 * scale / weight.double().norm(dim=1, keepdim=True)).clamp(max=1.0).nan_to_num()
    max_norm_([weight], 3 * scale)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)


def test_a_second_projection_rests():
    weight = drawn(50, 20)
    max_norm_([weight], 1.0)
    once = weight.clone()
    max_norm_([weight], 1.0)
    torch.testing.assert_close(weight, once, rtol=1e-6, atol=0)
    assert weight.norm(dim=1).max() <= 1 + 1e-6


def test_16_bits_zeros_vectors_and_empty_tensors():
    weight, zero, bias, empty = drawn(4, 4, dtype=torch.bfloat16), torch.zeros(2, 2), torch.full((3,), 9.0), drawn(0, 3)
    max_norm_([weight, zero, bias, empty], 1.0)
    assert weight.float().norm(dim=1).max() < 1.01 and weight.dtype == torch.bfloat16
    assert zero.tolist() == [[0.0, 0.0], [0.0, 0.0]] and bias.tolist() == [9.0] * 3


@pytest.mark.parametrize(("max_norm", "dim"), [(0.0, 0), (float("nan"), 0), (1.0, -1)])
def test_bad_input_is_refused(max_norm, dim):
    with pytest.raises(ValueError, match=r"^max_norm_\((max_norm|dim)=.*\): .* must be"):
        max_norm_([], max_norm, dim)
