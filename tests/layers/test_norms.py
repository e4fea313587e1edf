# SPDX-License-Identifier: Apache-2.0
"""Tests common to the four norms: torch's results, layouts, state dicts, and errors for bad inputs."""

import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import DTYPES, EPS, NORMS, SHAPES, check_against_fp64, never_small, numbers, run
from torch import nn

from lightning_optkit._native import extension

needs_extension = pytest.mark.skipif(extension is None, reason="the extension is not built")
KINDS = pytest.mark.parametrize("kind", NORMS)
EACH_NORM = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


def first(y):
    """The normalized sum, where the layer gives the sum, too."""
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@KINDS
def test_error_is_no_larger_than_that_of_torch(kind, shape, dtype, isa, always_ours):
    check_against_fp64(kind, numbers(*shape), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@KINDS
def test_float32_parameters_beside_16_bit_inputs(kind, dtype, always_ours):
    n = numbers(20, 70).to(dtype, torch.float32)
    ours = run(kind, n, ours=True)
    exact = run(kind, n.to(torch.float64), ours=False, stored=dtype)
    for o, e in zip(ours, exact, strict=True):
        assert (o.double() - e).abs().max() <= 2 * torch.finfo(o.dtype).eps * e.abs().max()
    assert ours[0].dtype == dtype and ours[-1].dtype == torch.float32


@EACH_NORM
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    size=st.integers(2, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_any_shape(norm, rows, size, dtype, seed, offset):
    n = numbers(rows, size, seed, offset=offset).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        never_small(patch)
        ours = run(norm.name, n, ours=True)
    exact = run(norm.name, n.to(torch.float64), ours=False, stored=dtype)
    for o, e in zip(ours, exact, strict=True):
        if e.numel():
            # A row of two nearly equal numbers stretches every rounding by 1 / its deviation.
            total = sum(t.double() for t in norm.inputs(n.x, n.residual))
            spread = total.std(-1).clamp_min(1e-3).min().item() if rows else 1.0
            assert (o.double() - e).abs().max() <= 64 * torch.finfo(dtype).eps * e.abs().max().clamp_min(1) / min(
                1, spread
            ) ** 2


@needs_extension
@pytest.mark.parametrize("shape", [(65, 3), (200, 300), (1025, 129), (5, 20000)], ids=str)
@KINDS
def test_the_number_of_threads_changes_no_bit(kind, shape, threads, always_ours):
    for dtype in (torch.float32, torch.bfloat16):
        n = numbers(*shape).to(dtype)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(run(kind, n, ours=True))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def views(tensor):
    """The same numbers in other layouts."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    yield wide[..., : tensor.shape[-1]]
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield tensor.transpose(0, -1).contiguous().transpose(0, -1)


@EACH_NORM
def test_layouts(norm, always_ours):
    x, residual, dy = torch.randn(6, 5, 48), torch.randn(6, 5, 48), torch.randn(6, 5, 48)
    module = norm.module(48)

    def grads(x):
        inputs = [t.detach().requires_grad_() for t in norm.inputs(x, residual)]
        y = first(module(*inputs))
        return [y, *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)]

    expected = grads(x)
    for view in views(x):
        assert all(torch.equal(a, b) for a, b in zip(expected, grads(view), strict=True))
    expanded = torch.randn(1, 1, 48).expand(6, 5, 48)
    found, expected = grads(expanded), grads(expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@EACH_NORM
def test_an_expanded_gradient(norm, always_ours):
    x = torch.randn(4, 40, requires_grad=True)
    module = norm.module(40)
    (found,) = torch.autograd.grad(first(module(*norm.inputs(x))).sum(), x)
    (expected,) = torch.autograd.grad(norm.torch_forward(module, x).sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(6,), (4, 6), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@EACH_NORM
def test_several_dimensions_with_and_without_parameters(norm, sizes, affine, always_ours):
    inputs = norm.inputs(torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6))
    ours = norm.module(sizes, elementwise_affine=affine)
    theirs = norm.torch_module(sizes, elementwise_affine=affine)
    torch.testing.assert_close(first(ours(*inputs)), theirs(sum(inputs)), atol=2e-6, rtol=2e-6)


@EACH_NORM
def test_state_dict_is_that_of_torch(norm):
    ours, theirs = norm.module(8), norm.torch_module(8)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))


@EACH_NORM
def test_gradcheck_and_gradients_of_gradients(norm, always_ours):
    n = numbers(3, 34).to(torch.float64)
    inputs = norm.inputs(n.x, n.residual)
    tensors = [t.requires_grad_() for t in (*inputs, *norm.parameters(n))]

    def call(*t):
        return norm.function(*t[: len(inputs)], (34,), *t[len(inputs) :], eps=EPS)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@needs_extension
@pytest.mark.parametrize(
    ("norm", "dropout"),
    [(norm, dropout) for norm in NORMS.values() for dropout in ((0.0, 0.25) if norm.adds else (0.0,))],
    ids=lambda value: getattr(value, "name", value),
)
def test_opcheck(norm, dropout):
    op = torch.ops.lightning_optkit
    n = numbers(5, 40).to(torch.float32)
    for t in (n.x, n.residual, n.weight, n.bias):
        t.requires_grad_()
    centered, bias, seed = norm.has_bias, n.bias if norm.has_bias else None, torch.tensor(3) if dropout else None
    if norm.adds:
        torch.library.opcheck(op.add_norm.default, (centered, n.x, n.residual, n.weight, bias, 1, EPS, dropout, seed))
    else:
        torch.library.opcheck(op.norm.default, (centered, n.x, n.weight, bias, 1, EPS))
    stats = torch.rand(2 if centered else 1, 5)
    arguments = (centered, n.dy, n.d_sum, n.x.detach(), stats, n.weight.detach(), 1, dropout, seed)
    for wants in ((True, True, centered), (False, True, False), (True, False, False)):
        torch.library.opcheck(op.norm_backward.default, (*arguments, *wants))


@needs_extension
@EACH_NORM
def test_compiles_without_a_graph_break(norm):
    module = norm.module(300)
    torch.manual_seed(0)
    x, residual = torch.randn(300, 300, requires_grad=True), torch.randn(300, 300, requires_grad=True)

    def outputs(f):
        y = f(*norm.inputs(x, residual))
        y = y if isinstance(y, tuple) else (y,)
        return [*y, *torch.autograd.grad(sum(t.square().sum() for t in y), [x, *module.parameters()])]

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs(compiled), outputs(module), strict=True):
        torch.testing.assert_close(a, b)


@EACH_NORM
def test_cpu_autocast_leaves_the_dtypes_alone_as_in_torch(norm, always_ours):
    ours, theirs = norm.module(40), norm.torch_module(40)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 40).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = first(ours(*norm.inputs(x)))
            assert y.dtype == torch.layer_norm(x, (40,), theirs.weight).dtype == dtype


@EACH_NORM
def test_function_transforms_go_through_torch(norm, always_ours):
    module, theirs, x = norm.module(40), norm.torch_module(40), torch.randn(3, 40)

    def transformed(forward):
        per_sample = torch.func.vmap(torch.func.grad(lambda t: forward(t).sin().sum()))(x)
        return per_sample, *torch.func.jvp(forward, (x,), (torch.arange(120.0).sin().view(3, 40),))

    found = transformed(lambda t: first(module(*norm.inputs(t))))
    torch.testing.assert_close(found, transformed(theirs), atol=1e-5, rtol=1e-5)


BAD = [
    (dict(size=(4, 5)), "(input.shape=(4, 5)): the last dimensions must be (6,)."),
    (dict(size=(4, 6), dtype=torch.int64), "(input.dtype=torch.int64): input must be floating point."),
    (
        dict(size=(4, 6), dtype=torch.float64),
        "(weight.dtype=torch.float32): must be torch.float64 beside an input in torch.float64.",
    ),
    (dict(size=(4, 6), device="meta"), "(weight.device=cpu): must be the device of the input, meta."),
]


@pytest.mark.parametrize(("ones", "message"), BAD)
@pytest.mark.parametrize("small", [True, False])
@EACH_NORM
def test_bad_input_gives_one_sentence(norm, ones, message, small, monkeypatch):
    if not small:
        never_small(monkeypatch)
    with pytest.raises(ValueError, match=re.escape(norm.owner + message)):
        norm.module(6)(*norm.inputs(torch.ones(**ones)))


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.5, TypeError), ((), ValueError)])
@EACH_NORM
def test_bad_sizes_raise_at_construction(norm, size, error):
    with pytest.raises(error, match=rf"^{norm.owner}\(normalized_shape="):
        norm.module(size)


@EACH_NORM
def test_no_rows(norm, always_ours):
    x = torch.zeros(0, 40, requires_grad=True)
    module = norm.module(40)
    y = first(module(*norm.inputs(x)))
    grads = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert y.shape == (0, 40) and all(not g.any() for g in grads)


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["lightning_optkit._C"] = None
import torch
from lightning_optkit.layers import {0} as Norm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    module, x = Norm(6), torch.arange(12.0).view(2, 6)
    y = [module(x, torch.ones(2, 6))[0] if "Add" in "{0}" else module(x + 1) for _ in range(2)]
print(len([w for w in caught if "without its compiled extension" in str(w.message)]))
print(all(torch.equal(each, torch.nn.{1}(6)(x + 1)) for each in y))
"""


@EACH_NORM
def test_without_the_extension_torch_does_it_and_says_so_once(norm):
    program = WITHOUT_EXTENSION.format(norm.owner, norm.torch_module.__name__)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "True"], done.stderr
