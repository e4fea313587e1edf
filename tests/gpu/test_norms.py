# SPDX-License-Identifier: Apache-2.0
"""The norms on CUDA: all four, forward and backward, against the formula in fp64 and against the CPU's dropout."""

import pytest
import torch

from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZES = [1, 3, 32, 64, 127, 128, 255, 256, 513, 768, 1000, 1024, 1600, 2048, 3001, 4096, 5120, 8192, 9001, 16384, 40000]
KINDS = [LayerNorm, RMSNorm, AddLayerNorm, AddRMSNorm]


def tensors(kind, rows, size, dtype, weight_dtype=None, **arguments):
    torch.manual_seed(rows + size)
    layer = kind(size, device="cuda", dtype=weight_dtype or dtype, **arguments)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(size))
    x = (torch.randn(rows, size, device="cuda") * 2 + 0.5).to(dtype).requires_grad_()
    residual = torch.randn(rows, size, device="cuda").to(dtype).requires_grad_()
    return layer, [x, residual] if kind in (AddLayerNorm, AddRMSNorm) else [x]


def results(layer, inputs):
    """Outputs, and gradients of inputs and parameters."""
    outputs = layer(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    grads = [torch.randn(o.shape, device=o.device).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, [*inputs, *layer.parameters()], grads)
    return [*outputs, *found], grads


def exact(layer, inputs, grads):
    """The same in fp64; what is normalized is the sum as it was stored."""
    double = [t.detach().double().requires_grad_() for t in inputs]
    params = [p.detach().double().requires_grad_() for p in layer.parameters()]
    total = double[0]
    if len(inputs) == 2:
        total = double[0] + double[1]
        total = total + (total.to(inputs[0].dtype).double() - total).detach()
    size = total.shape[-1:]
    if isinstance(layer, LayerNorm | AddLayerNorm):
        y = torch.nn.functional.layer_norm(total, size, params[0], params[1], layer.eps)
    else:
        eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
        y = torch.nn.functional.rms_norm(total, size, params[0], eps)
    outputs = [y, total] if len(inputs) == 2 else [y]
    found = torch.autograd.grad(outputs, [*double, *params], [g.double() for g in grads])
    return [*outputs, *found]


def check(kind, rows, size, dtype, **arguments):
    layer, inputs = tensors(kind, rows, size, dtype, **arguments)
    found, grads = results(layer, inputs)
    for k, (value, wanted) in enumerate(zip(found, exact(layer, inputs, grads), strict=True)):
        error = (value.double() - wanted).abs().max().item()
        slack = 2e-6 * (1 + rows**0.5) * (600 if size <= 3 else 1)
        bound = (2 * torch.finfo(value.dtype).eps + slack) * max(1.0, wanted.abs().max().item())
        assert error <= bound, (kind.__name__, k, rows, size, dtype, error, bound)


@pytest.mark.parametrize("size", SIZES)
def test_every_kind_length_and_dtype(size):
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(kind, 97, size, dtype)
        check(kind, 33, size, torch.bfloat16, weight_dtype=torch.float32)


@pytest.mark.parametrize("size", [3, 255, 1024, 9001])
def test_fp64(size):
    for kind in KINDS:
        check(kind, 17, size, torch.float64)


@pytest.mark.parametrize("rows", [1, 7, 65_536, 1_000_003])
def test_any_number_of_rows(rows):
    for kind in KINDS:
        check(kind, rows, 64, torch.bfloat16)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free memory")
    rows, size = 2**20 + 1, 2048
    x = torch.ones(rows, size, dtype=torch.bfloat16, device="cuda")
    x[:, 1::2] = 3.0
    x.requires_grad_()
    layer = LayerNorm(size, device="cuda", dtype=torch.bfloat16)
    y = layer(x)
    for row in (0, 2**20 - 1, 2**20):
        torch.testing.assert_close(y[row, :2].tolist(), [-1.0, 1.0])
    y.backward(torch.ones_like(y))
    assert x.grad[-1].abs().max() < 1e-2
    torch.testing.assert_close(layer.bias.grad, torch.full_like(layer.bias, float(rows)))


def test_rows_that_are_not_packed():
    whole = torch.randn(40, 3 * 256, device="cuda", dtype=torch.bfloat16)
    layer = LayerNorm(256, device="cuda", dtype=torch.bfloat16)
    for begin in (0, 8, 13):
        part = whole[:, begin : begin + 256]
        torch.testing.assert_close(layer(part), layer(part.clone()), rtol=0, atol=0)
    turned = torch.randn(256, 40, device="cuda").t()
    layer = RMSNorm(256, device="cuda")
    torch.testing.assert_close(layer(turned), layer(turned.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_lets_the_same_elements_live_as_on_the_cpu(dtype):
    add_norm = torch.ops.lightning_optkit._add_norm.default
    x, residual = torch.randn(50, 1000).to(dtype), torch.randn(50, 1000).to(dtype)
    for seed in (0, 12345, -7):
        calls = [
            add_norm(True, x.to(d), residual.to(d), None, None, 1, 1e-5, 0.3, torch.tensor(seed))
            for d in ("cpu", "cuda")
        ]
        assert torch.equal(calls[0][1], calls[1][1].cpu())
        torch.testing.assert_close(
            calls[0][0], calls[1][0].cpu(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def test_dropout_drops_gradients_of_what_it_dropped():
    layer = AddLayerNorm(512, dropout=0.25, device="cuda")
    x = torch.randn(64, 512, device="cuda", requires_grad=True)
    y, total = layer(x, torch.zeros_like(x))
    (y.sum() + total.square().sum()).backward()
    assert torch.equal(total == 0, x.grad == 0)
    assert abs((total == 0).float().mean().item() - 0.25) < 0.02


def test_compiled_without_a_graph_break():
    for kind in KINDS:
        layer, inputs = tensors(kind, 64, 768, torch.bfloat16)
        found, _ = results(torch.compile(layer, fullgraph=True), inputs)
        wanted, _ = results(layer, inputs)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_captured_in_a_graph():
    layer, (x,) = tensors(LayerNorm, 64, 768, torch.float32)
    wanted = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    torch.testing.assert_close(y, wanted.detach(), rtol=0, atol=0)


def test_autocast_as_torch():
    layer, (x,) = tensors(LayerNorm, 8, 256, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.nn.functional.layer_norm(x.bfloat16(), (256,)).dtype


def test_gradients_of_gradients():
    for centered in (True, False):
        layer = (LayerNorm if centered else RMSNorm)(5, device="cuda", dtype=torch.float64)
        x = torch.randn(3, 5, dtype=torch.float64, device="cuda", requires_grad=True)
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradgradcheck(layer, x)


def test_two_runs_give_the_same_bits():
    layer, inputs = tensors(AddLayerNorm, 5000, 1000, torch.bfloat16)
    first, _ = results(layer, inputs)
    second, _ = results(layer, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_sanitized_norms():
    for size in (3, 64, 255, 768, 2048, 4096, 8192, 9001):
        check(AddLayerNorm, 9, size, torch.bfloat16)
        check(RMSNorm, 9, size, torch.float32)
