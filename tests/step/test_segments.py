# SPDX-License-Identifier: Apache-2.0
"""Which parameters share a walk, and which cannot take the compiled path."""

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD
from lightning_optkit.step.segments import is_dense, why_not_compiled

BLOCK = torch.empty(2, 3, 4, 5)
DENSE = {
    "contiguous": BLOCK,
    "transposed": BLOCK.transpose(0, 2),
    "permuted": BLOCK.permute(3, 1, 0, 2),
    "channels last": BLOCK.to(memory_format=torch.channels_last),
    "scalar": torch.empty(()),
    "empty": torch.empty(0, 3),
    "slice of rows": torch.empty(9, 4)[2:5],
    "size 1 with an odd stride": torch.empty_strided((3, 1), (1, 1000)),
    "one column, alone": torch.empty(5, 3)[:1, :],
}
GAPPED = {
    "column": torch.empty(5, 3)[:, 0],
    "every other": torch.empty(10)[::2],
    "narrowed": torch.empty(5, 3)[:, :2],
    "expanded": torch.empty(1, 3).expand(5, 3),
    "overlapping": torch.empty(4).as_strided((3, 2), (1, 1)),
}


@pytest.mark.parametrize("layout", DENSE)
def test_a_block_of_memory_is_dense_in_any_order_of_dimensions(layout):
    assert is_dense(DENSE[layout])


@pytest.mark.parametrize("layout", GAPPED)
def test_gaps_and_overlaps_are_not_dense(layout):
    assert not is_dense(GAPPED[layout])


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.parametrize(
    ("t", "reason"),
    [
        (torch.empty(2), None),
        (torch.empty(2, dtype=torch.bfloat16), None),
        (torch.empty(2, dtype=torch.complex64), "no kernel for complex64"),
        (torch.empty(2, dtype=torch.float8_e4m3fn), "no kernel for float8_e4m3fn"),
        (torch.empty(2, device="meta"), "no kernel for device meta"),
        (GAPPED["column"], "its memory has gaps or overlaps"),
    ],
    ids=["fp32", "bf16", "complex", "fp8", "meta", "gapped"],
)
def test_says_why_a_parameter_cannot_be_compiled(t, reason):
    assert why_not_compiled(t) == reason


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_every_16_and_32_bit_parameter_shares_one_plan():
    params = [
        torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    optimizer = SGD([dict(params=params[:1]), dict(params=params[1:], lr=0.5)])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [len(segment.entries) for segment in optimizer._engine.plan.segments] == [3]
    assert [p[0].item() for p in params] == pytest.approx([0.999, 0.5, 0.5])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_complex_parameter_beside_real_ones_shares_their_clip(dtype):
    real, imaginary = torch.ones(2, requires_grad=True), torch.ones(2, dtype=dtype, requires_grad=True)
    optimizer = SGD([real, imaginary], lr=1.0, clip=ClipNorm(1.0))
    real.grad, imaginary.grad = torch.tensor([3.0, 0.0]), torch.tensor([4j, 0.0], dtype=dtype)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(5.0)
    assert real[0].item() == pytest.approx(1 - 0.6, abs=1e-6)
    assert imaginary[0].item() == pytest.approx(1 - 0.8j, abs=1e-6)
