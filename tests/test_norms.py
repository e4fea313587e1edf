# SPDX-License-Identifier: Apache-2.0
"""Norms over the range of fp32, against fp64."""

import math

import pytest
import torch

from lightning_optkit._norms import each_norm, norm, total_norm

SCALES = [1e-37, 1e-30, 1e-22, 1e-12, 1.0, 1e12, 1e18, 1e22, 1e30, 1e36]


@pytest.mark.parametrize("dim", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_any_scale_is_right(scale, dim):
    torch.manual_seed(0)
    t = torch.randn(5, 40, 3) * scale
    expected = torch.linalg.vector_norm(t.double(), dim=dim, keepdim=True)
    torch.testing.assert_close(norm(t, dim, keepdim=True), expected, rtol=1e-6, atol=0)


def test_rows_of_any_scale_side_by_side():
    t = torch.ones(4, 9) * torch.tensor([[1e-30], [1.0], [1e30], [0.0]])
    torch.testing.assert_close(norm(t, [1]), 3 * t[:, 0].double(), rtol=1e-6, atol=0)


def test_16_bits_are_added_in_more_and_complex_numbers_by_their_length():
    assert norm(torch.full((4096,), 60000.0, dtype=torch.float16)).item() == pytest.approx(64 * 60000, rel=1e-3)
    assert norm(torch.full((4096,), 1.0, dtype=torch.bfloat16)).item() == 64
    assert norm(torch.tensor([3e30 + 4e30j, 0.0])).item() == pytest.approx(5e30, rel=1e-6)


def test_all_tensors_together_and_none():
    scales = [torch.full((4,), scale) for scale in (1e30, 3e30, 1e-30)]
    assert total_norm(scales).item() == pytest.approx(2 * math.sqrt(10) * 1e30, rel=1e-6)
    assert total_norm([]).item() == 0
    assert total_norm([torch.zeros(0), torch.zeros(3)]).item() == 0


def test_each_of_many_is_what_it_is_alone():
    torch.manual_seed(0)
    tensors = [torch.randn(5) * scale for scale in (1e-30, 1.0, 1e30, 0.0)]
    tensors += [torch.randn(3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64)]
    tensors += [torch.randn(4, 6).T, torch.zeros(0), torch.tensor([math.nan, 1.0]), torch.tensor([math.inf])]
    found = each_norm(tensors)
    assert all(torch.equal(a, norm(b)) or (a.isnan() and norm(b).isnan()) for a, b in zip(found, tensors, strict=True))
    assert each_norm([]) == [] and all(each.dtype == torch.float64 and each.ndim == 0 for each in found)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    found = total_norm([torch.tensor([1e30, bad]), torch.ones(2)])
    assert found.isnan() if math.isnan(bad) else found == math.inf
