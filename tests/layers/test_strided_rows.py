# SPDX-License-Identifier: Apache-2.0
"""Inputs and gradients with rows that are adjacent in memory, e.g. transposed or channels first."""

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

pytestmark = pytest.mark.skipif(extension is None, reason="the extension is not built")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Rows and columns below, at and beyond a vector's lanes, a cache line and a block; rows short enough to share a vector.
SHAPES = [(7, 40), (3, 100), (64, 64), (65, 33), (100, 17), (130, 255), (300, 3), (35, 1100)]
SHAPES_OF_BATCHES = [(3, 50, 24), (2, 1, 9), (2, 7, 300), (4, 128, 96), (2, 3, 31, 40)]


def strided(tensor):
    """The same numbers, the last dimension outermost but for the first of three or more (channels first)."""
    keep = tensor.dim() >= 3
    return tensor.movedim(-1, 1 if keep else 0).contiguous().movedim(1 if keep else 0, -1)


def run(module, operands, gradients):
    operands = [t.detach().requires_grad_() for t in operands]
    outputs = module(*operands)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, [*operands, *module.parameters()], gradients[: len(outputs)])


def assert_same(found, expected, num_outputs):
    """Outputs have the same bits; gradients may be added up in another order."""
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if index < num_outputs:
            assert torch.equal(a, b)
        else:
            tolerance = {torch.float64: 1e-11, torch.float32: 1e-4}.get(a.dtype, 2e-2)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.shape[-1] ** 0.5)


def modules(size, dtype):
    torch.manual_seed(size)
    for cls in (LayerNorm, RMSNorm, AddLayerNorm, AddRMSNorm):
        module = cls(size).to(dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, 1.0)
        yield module


def check(shape):
    for dtype in DTYPES:
        x, residual, dy, d_sum = (torch.randn(shape).to(dtype) for _ in range(4))
        for module in modules(shape[-1], dtype):
            if type(module) in (LayerNorm, RMSNorm):
                expected = run(module, [x], [dy])
                assert_same(run(module, [strided(x)], [dy]), expected, 1)
                assert_same(run(module, [strided(x)], [strided(dy)]), expected, 1)
            else:
                expected = run(module, [x, residual], [dy, d_sum])
                assert_same(run(module, [strided(x), residual], [dy, d_sum]), expected, 2)
                assert_same(run(module, [x, strided(residual)], [dy, strided(d_sum)]), expected, 2)
                everything = [strided(t) for t in (x, residual, dy, d_sum)]
                assert_same(run(module, everything[:2], everything[2:]), expected, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, isa):
    check(shape)


@pytest.mark.parametrize("shape", SHAPES_OF_BATCHES, ids=str)
def test_channels_first(shape, always_ours):
    check(shape)


def test_operands_turned_in_different_ways(always_ours):
    x, residual, dy, d_sum = (torch.randn(6, 40, 48) for _ in range(4))
    flat = residual.reshape(240, 48).t().contiguous().t().view(6, 40, 48)  # its rows are neighbors across the batch too
    module = AddLayerNorm(48)
    expected = run(module, [x, residual], [dy, d_sum])
    flat_dy = dy.reshape(240, 48).t().contiguous().t().view(6, 40, 48)
    assert_same(run(module, [strided(x), flat], [flat_dy, strided(d_sum)]), expected, 2)
    assert_same(run(module, [x, strided(residual)], [strided(dy), d_sum]), expected, 2)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_operands_of_two_dtypes(dtypes, always_ours):
    x, residual = torch.randn(70, 90).to(dtypes[0]), torch.randn(70, 90).to(dtypes[1])
    gradients = [torch.randn(70, 90), torch.randn(70, 90)]
    module = AddRMSNorm(90)
    assert_same(
        run(module, [strided(x), strided(residual)], gradients), run(module, [x, residual], gradients), num_outputs=2
    )


def test_dropout_drops_the_same_elements(always_ours):
    x, residual, dy, d_sum = (torch.randn(3, 70, 40) for _ in range(4))
    module = AddLayerNorm(40, dropout=0.3)
    results = []
    for layout in (lambda t: t, strided):
        torch.manual_seed(5)
        results.append(run(module, [layout(x), layout(residual)], [layout(dy), layout(d_sum)]))
    assert (results[0][2] == 0).any()  # through what was dropped no gradient flows
    assert_same(*results, num_outputs=2)


@pytest.mark.parametrize("shape", [(4, 500, 300), (7, 8192)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, threads, always_ours):
    x, dy = torch.randn(shape), torch.randn(shape)
    module, results = LayerNorm(shape[-1]), []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(module, [strided(x)], [strided(dy)]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t[:, :, ::2],
        lambda t: t.transpose(1, 2)[:, :, ::3],
        lambda t: t.permute(2, 0, 1),
        lambda t: t[:, :1, :].expand(-1, 40, -1),
        lambda t: t[:, :, :1].expand(-1, -1, 48),
        lambda t: t.transpose(1, 2)[:, 5:39, 7:],
    ],
    ids=["every other", "every third row", "rotated", "one row", "one number", "a window"],
)
def test_any_other_layout(layout, always_ours):
    x = layout(torch.randn(6, 40, 48))
    module = LayerNorm(x.shape[-1])
    dy = torch.randn(x.shape)
    assert_same(run(module, [x], [dy]), run(module, [x.contiguous()], [dy]), num_outputs=1)
    strided = layout(torch.randn(6, 40, 48))
    assert_same(run(module, [x], [strided]), run(module, [x.contiguous()], [strided.contiguous()]), num_outputs=1)


@pytest.mark.parametrize("size", [2**16, 2**16 + 1])
def test_rows_too_long_for_a_buffer(size, always_ours):
    x, dy = torch.randn(3, size), torch.randn(3, size)
    module = LayerNorm(size)
    assert_same(run(module, [strided(x)], [strided(dy)]), run(module, [x], [dy]), num_outputs=1)
