# SPDX-License-Identifier: Apache-2.0
"""What only the norms with a residual have: dropout, a second output, and a second input."""

import pytest
import torch
from norm_cases import DTYPES, NORMS

ADD_NORMS = [norm for norm in NORMS.values() if norm.adds]
EACH_ADD_NORM = pytest.mark.parametrize("norm", ADD_NORMS, ids=lambda norm: norm.name)


@EACH_ADD_NORM
def test_the_mean_of_dropout_and_its_gradient(norm, always_ours):
    x = torch.ones(400, 250, requires_grad=True)
    _, total = norm.function(x, torch.zeros(400, 250), (250,), dropout=0.3)
    assert set(total.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    share = (total == 0).float().mean().item()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / total.numel()) ** 0.5
    (found,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(found, total.detach())
    assert not torch.equal(total[0], total[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 70])
@EACH_ADD_NORM
def test_kernel_and_reference_drop_the_same(norm, dtype, size, isa, always_ours, monkeypatch):
    x, residual = torch.randn(40, size).to(dtype), torch.randn(40, size).to(dtype)
    torch.manual_seed(5)
    _, ours = norm.function(x, residual, (size,), dropout=0.4)
    monkeypatch.setattr("lightning_optkit.layers._dispatch._takes_kernel", lambda tensor: False)
    torch.manual_seed(5)
    _, theirs = norm.function(x, residual, (size,), dropout=0.4)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(ours, x + residual)


@EACH_ADD_NORM
def test_manual_seed_repeats_the_mask(norm):
    x, residual = torch.randn(4, 40), torch.randn(4, 40)
    module = norm.module(40, dropout=0.5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(module(x, residual)[1])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(module.eval()(x, residual)[1], x + residual)
    module.train().dropout = 1.0
    assert torch.equal(module(x, residual)[1], residual)
    assert "dropout=1.0" in repr(module)


@EACH_ADD_NORM
def test_the_gradient_with_dropout_is_right(norm, always_ours):
    torch.manual_seed(0)
    x, residual = (torch.randn(6, 34, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x, residual):
        torch.manual_seed(3)
        return norm.function(x, residual, (34,), dropout=0.3)

    assert torch.autograd.gradcheck(call, (x, residual), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, residual), fast_mode=True)


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
@EACH_ADD_NORM
def test_a_dropout_out_of_range_raises(norm, dropout):
    message = rf"^{norm.owner}\(dropout={dropout}\): dropout must be in \[0, 1\]\.$"
    with pytest.raises(ValueError, match=message):
        norm.module(4, dropout=dropout)
    module = norm.module(4)
    with pytest.raises(ValueError, match=message):
        module.dropout = dropout


@pytest.mark.parametrize("used", ["norm", "sum"])
@EACH_ADD_NORM
def test_only_one_output_used(norm, used, always_ours):
    x, residual = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40, requires_grad=True)
    module = norm.module(40)

    def gradient(y, total):
        return torch.autograd.grad((y if used == "norm" else total).sin().sum(), x)[0]

    found = gradient(*module(x, residual))
    total = x + residual
    torch.testing.assert_close(found, gradient(norm.torch_forward(module, total), total))


@EACH_ADD_NORM
def test_a_float32_residual_beside_16_bits(norm, always_ours):
    x, residual = torch.randn(6, 40).bfloat16().requires_grad_(), torch.randn(6, 40, requires_grad=True)
    y, total = norm.module(40)(x, residual)
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)
    dx, d_residual = torch.autograd.grad(y.sum() + total.square().sum(), [x, residual])
    assert dx.dtype == torch.bfloat16 and d_residual.dtype == torch.float32
    torch.testing.assert_close(dx, d_residual.bfloat16())


@EACH_ADD_NORM
def test_shapes_that_differ(norm):
    message = rf"{norm.owner}\(residual.shape=\(1, 6\)\): must be the shape of the input, \(4, 6\)\."
    with pytest.raises(ValueError, match=message):
        norm.module(6)(torch.randn(4, 6), torch.randn(1, 6))
