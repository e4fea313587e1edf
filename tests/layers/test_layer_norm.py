# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import DTYPES, EPS, SHAPES, check_against_fp64, numbers, run
from torch import nn

from lightning_optkit._native import extension
from lightning_optkit.layers import LayerNorm, layer_norm

needs_extension = pytest.mark.skipif(extension is None, reason="the extension is not built")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_no_larger_than_that_of_torch(shape, dtype, isa, always_ours):
    check_against_fp64("layer", numbers(*shape), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_16_bit_inputs(dtype, always_ours):
    n = numbers(20, 70).to(dtype, torch.float32)
    ours = run("layer", n, ours=True)
    exact = run("layer", n.to(torch.float64), ours=False, stored=dtype)
    for o, e in zip(ours, exact, strict=True):
        assert (o.double() - e).abs().max() <= 2 * torch.finfo(o.dtype).eps * e.abs().max()
    assert ours[0].dtype == dtype and ours[-1].dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 70),
    size=st.integers(2, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_any_shape(rows, size, dtype, seed, offset):
    n = numbers(rows, size, seed, offset=offset).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SMALL_LAYER", "SMALL_RMS", "SMALL_ADD_LAYER", "SMALL_ADD_RMS"):
            patch.setattr(f"lightning_optkit.layers._dispatch.{name}", -1)
        ours = run("layer", n, ours=True)
    exact = run("layer", n.to(torch.float64), ours=False, stored=dtype)
    for o, e in zip(ours, exact, strict=True):
        if e.numel():
            # A row of two nearly equal numbers stretches every rounding by 1 / its deviation.
            spread = n.x.double().std(-1).clamp_min(1e-3).min().item() if rows else 1.0
            assert (o.double() - e).abs().max() <= 64 * torch.finfo(dtype).eps * e.abs().max().clamp_min(1) / min(
                1, spread
            ) ** 2


@needs_extension
@pytest.mark.parametrize("shape", [(65, 3), (200, 300), (1025, 129), (5, 20000)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, threads, always_ours):
    for dtype in (torch.float32, torch.bfloat16):
        n = numbers(*shape).to(dtype)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(run("layer", n, ours=True))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def views(tensor):
    """The same numbers in other layouts."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    yield wide[..., : tensor.shape[-1]]
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield tensor.transpose(0, -1).contiguous().transpose(0, -1)


def test_layouts(always_ours):
    x = torch.randn(6, 5, 48)
    module = LayerNorm(48)
    dy = torch.randn(6, 5, 48)

    def grads(*inputs):
        inputs = [t.detach().requires_grad_() for t in inputs]
        y = module(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        return [y, *torch.autograd.grad(y, [*inputs, *module.parameters()], dy)]

    expected = grads(x)
    for view in views(x):
        found = grads(view)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    expanded = torch.randn(1, 1, 48).expand(6, 5, 48)
    found, expected = grads(expanded), grads(expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_expanded_gradient(always_ours):
    x = torch.randn(4, 40, requires_grad=True)
    module = LayerNorm(40)
    y = module(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(F.layer_norm(x, (40,), module.weight, module.bias, module.eps).sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("sizes", [(6,), (4, 6), (3, 4, 6)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_several_dimensions_with_and_without_parameters(sizes, affine, always_ours):
    x = torch.randn(2, 3, 4, 6)
    ours = LayerNorm(sizes, elementwise_affine=affine)
    theirs = nn.LayerNorm(sizes, elementwise_affine=affine)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x), atol=2e-6, rtol=2e-6)


def test_state_dict_is_that_of_torch():
    ours, theirs = LayerNorm(8), nn.LayerNorm(8)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(ours.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, type(theirs))


def test_gradcheck_and_gradients_of_gradients(always_ours):
    n = numbers(3, 34).to(torch.float64)
    tensors = [t.requires_grad_() for t in ([n.x, n.residual, n.weight, n.bias] if False else [n.x, n.weight, n.bias])]

    def call(*t):
        x, *parameters = t
        return layer_norm(x, (34,), *parameters, eps=EPS)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@needs_extension
@pytest.mark.parametrize("dropout", [0.0])
def test_opcheck(dropout):
    op = torch.ops.lightning_optkit
    n = numbers(5, 40).to(torch.float32)
    for t in (n.x, n.residual, n.weight, n.bias):
        t.requires_grad_()
    seed = torch.tensor(3) if dropout else None
    torch.library.opcheck(op.norm.default, (True, n.x, n.weight, n.bias, 1, EPS))
    stats = torch.rand(2, 5)
    arguments = (True, n.dy, n.d_sum, n.x.detach(), stats, n.weight.detach(), 1, dropout, seed)
    for wants in ((True, True, True), (False, True, False), (True, False, False)):
        torch.library.opcheck(op.norm_backward.default, (*arguments, *wants))


@needs_extension
def test_compiles_without_a_graph_break():
    module = LayerNorm(300)
    torch.manual_seed(0)
    x = torch.randn(300, 300, requires_grad=True)

    def outputs(f):
        y = f(x)
        y = y if isinstance(y, tuple) else (y,)
        return [*y, *torch.autograd.grad(sum(t.square().sum() for t in y), [x, *module.parameters()])]

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs(compiled), outputs(module), strict=True):
        torch.testing.assert_close(a, b)


def test_cpu_autocast_leaves_the_dtypes_alone_as_in_torch(always_ours):
    ours, theirs = LayerNorm(40), nn.LayerNorm(40)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 40).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = ours(x)
            assert y.dtype == torch.layer_norm(x, (40,), theirs.weight).dtype == dtype


def test_function_transforms_and_subclasses_go_through_torch(always_ours):
    module = LayerNorm(40)
    x = torch.randn(3, 40)
    norm = lambda t: module(t)  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(lambda t: norm(t).square().sum()))(x)
    assert per_sample.shape == x.shape
    _, tangent = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    assert tangent.shape == x.shape


BAD = [
    (dict(x=torch.randn(4, 5)), r"LayerNorm\(input.shape=\(4, 5\)\): the last dimensions must be \(6,\)\."),
    (
        dict(x=torch.ones(4, 6, dtype=torch.int64)),
        r"LayerNorm\(input.dtype=torch.int64\): input must be floating point\.",
    ),
    (
        dict(x=torch.randn(4, 6, dtype=torch.float64)),
        r"LayerNorm\(weight.dtype=torch.float32\): must be torch.float64 beside an input in torch.float64\.",
    ),
    (
        dict(x=torch.randn(4, 6, device="meta")),
        r"LayerNorm\(weight.device=cpu\): must be the device of the input, meta\.",
    ),
]


@pytest.mark.parametrize(("inputs", "message"), BAD)
@pytest.mark.parametrize("small", [True, False])
def test_bad_input_gives_one_sentence(inputs, message, small, monkeypatch):
    if not small:
        for name in ("SMALL_LAYER", "SMALL_RMS", "SMALL_ADD_LAYER", "SMALL_ADD_RMS"):
            monkeypatch.setattr(f"lightning_optkit.layers._dispatch.{name}", -1)
    x = inputs["x"]
    with pytest.raises(ValueError, match=message):
        LayerNorm(6)(x)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (2.5, TypeError), ((), ValueError)])
def test_bad_sizes_raise_at_construction(size, error):
    with pytest.raises(error, match=r"^LayerNorm\(normalized_shape="):
        LayerNorm(size)


def test_no_rows(always_ours):
    x = torch.zeros(0, 40, requires_grad=True)
    module = LayerNorm(40)
    y = module(x)
    grads = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    assert y.shape == (0, 40) and all(not g.any() for g in grads)


REFERENCE = """
import torch, warnings
from lightning_optkit.layers import LayerNorm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    module = LayerNorm(6)
    for _ in range(2):
        y = module(torch.arange(12.0).view(2, 6))
print(len([w for w in caught if "without its compiled extension" in str(w.message)]))
print(y.sum().item() < 1e9)
"""


def test_without_the_extension_torch_does_it_and_says_so_once():
    hide = "import sys; sys.modules['lightning_optkit._C'] = None"
    done = subprocess.run(
        [sys.executable, "-c", hide + REFERENCE], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_torch_stops_counting_at_256_in_bfloat16_and_we_do_not(threads):
    threads(1)  # each thread of torch counts to 256
    x = torch.randn(4096, 8, dtype=torch.bfloat16)
    ones = torch.ones_like(x)
    found = []
    for module in (nn.LayerNorm(8, dtype=torch.bfloat16), LayerNorm(8, dtype=torch.bfloat16)):
        module(x).backward(ones)
        found.append(module.bias.grad)
    assert (found[0] == 256).all()  # the defect: torch 2.13 sums in bfloat16
    assert (found[1] == 4096).all()


def test_without_the_node_small_inputs_take_the_kernel_of_torch_by_shape_alone(monkeypatch):
    from lightning_optkit.layers._dispatch import SMALL_LAYER, SMALL_ROWS, _is_small

    monkeypatch.setattr("lightning_optkit.layers._dispatch.node", None)
    assert _is_small(torch.empty(7, 64), (64,), SMALL_LAYER)
    assert not _is_small(torch.empty(SMALL_ROWS + 1, 64), (64,), SMALL_LAYER)
    assert not _is_small(torch.empty(8, 8192), (8192,), SMALL_LAYER)
    torch.testing.assert_close(LayerNorm(64)(torch.ones(7, 64)), torch.zeros(7, 64))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_computed_or_lent(always_ours):
    """Parametrized, and given by `functional_call`: then it is no parameter of the module's own."""
    x, module = torch.randn(5, 40), LayerNorm(40)
    torch.nn.init.normal_(module.weight)
    expected = F.layer_norm(x, (40,), 2 * module.weight, module.bias)
    lent = torch.func.functional_call(module, {"weight": 2 * module.weight}, (x,))
    torch.testing.assert_close(lent, expected)
    torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert module.parametrizations.weight.original.grad is not None
