# SPDX-License-Identifier: Apache-2.0
"""The norms' C++ entries, called directly: invalid calls raise a clear error before memory is touched."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from lightning_optkit._native import extension, node
from lightning_optkit.layers import AddRMSNorm, LayerNorm, _ops

pytestmark = pytest.mark.skipif(extension is None, reason="the extension is not built")
OP = torch.ops.lightning_optkit
needs_node = pytest.mark.skipif(node is None, reason="the node is not built")


def freed(t):
    t.untyped_storage().resize_(0)
    return t


def shortened(t):
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


def ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


def arguments(name):
    """A right call."""
    x = torch.randn(6, 8)
    stats = torch.stack([x.mean(-1), x.var(-1, unbiased=False).rsqrt()])
    if name == "norm_backward":
        return dict(
            centered=True, dy=ones(6, 8), d_sum=ones(6, 8), input=x, stats=stats, weight=ones(8), dims=1, dropout=0.5,
            seed=torch.tensor(3), wants_input=True, wants_weight=True, wants_bias=True,
        )  # fmt: skip
    call = dict(centered=True, input=x, weight=ones(8), bias=ones(8), dims=1, eps=1e-5)
    if name.endswith("add_norm"):
        call |= dict(residual=ones(6, 8), dropout=0.5, seed=torch.tensor(3))
    return call


TENSORS = [
    ("another shape", lambda t: ones(*t.shape, 2), r"\.shape=\(.*\): must be \("),
    ("one short", lambda t: t[..., :-1], r"\.shape=\(.*\): must be \("),
    ("empty", lambda t: ones(0), r"\.shape=\(0,\)\): must be \("),
    ("integers", lambda t: t.to(torch.int8), r"\.dtype=torch\.int8\): must be float64, "),
    ("complex", lambda t: t.to(torch.complex64), r"\.dtype=torch\.complex64\): must be float64, "),
    ("eight bits", lambda t: t.to(torch.float8_e5m2), r"\.dtype=torch\.float8_e5m2\): must be float64, "),
    ("quantized", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), r"\.dtype=dtype number 12\): must"),
    ("double", lambda t: t.double(), r"\.dtype=torch\.float64\): "),
    ("sparse", lambda t: t.to_sparse(), r"\.layout=torch\.sparse_coo\): must be torch\.strided"),
    ("mkldnn", lambda t: t.to_mkldnn(), r"\.layout=torch\._mkldnn\): must be torch\.strided"),
    ("nested", lambda t: torch.nested.nested_tensor([t, t]), r"\.is_nested=True\): must be one tensor"),
    ("freed", lambda t: freed(t.clone()), r"\.untyped_storage\(\)\.nbytes\(\)=0\): must be the \d+ bytes"),
    ("shortened", lambda t: shortened(t.clone()), r"\.untyped_storage\(\)\.nbytes\(\)=\d+\): must be the \d+ bytes"),
]
WHERE = {
    "norm": ("weight", "bias"),
    "_norm": ("weight", "bias"),
    "add_norm": ("residual", "weight", "bias"),
    "_add_norm": ("residual", "weight", "bias"),
    "norm_backward": ("dy", "d_sum", "stats", "weight"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in TENSORS], ids=[case[0] for case in TENSORS])
def test_a_tensor_that_does_not_fit(name, spoil, message):
    for argument in WHERE[name]:
        call = arguments(name)
        call[argument] = spoil(call[argument])
        with pytest.raises(ValueError, match=rf"^{name}\({argument}{message}.*\.$"):
            getattr(OP, name)(**call)


@pytest.mark.parametrize("name", WHERE)
def test_an_input_that_no_kernel_reads(name):
    for spoil, message in [case[1:] for case in TENSORS if case[0] in ("integers", "sparse", "mkldnn", "freed")]:
        call = arguments(name)
        call["input"] = spoil(call["input"])
        with pytest.raises(ValueError, match=rf"^{name}\(input{message}.*\.$"):
            getattr(OP, name)(**call)


NUMBERS = [
    ("dims", 0, r"dims=0\): must be in \[1, 2\]"),
    ("dims", 3, r"dims=3\): must be in \[1, 2\]"),
    ("dims", -(2**40), r"dims=-1099511627776\): must be in \[1, 2\]"),
    ("eps", -1.0, r"eps=-1(\.0)?\): .*must be .*\[0, inf\)"),
    ("eps", float("nan"), r"eps=nan\): .*must be .*\[0, inf\)"),
    ("dropout", 1.5, r"dropout=1\.5\): .*must be .*\[0, 1\]"),
    ("dropout", float("nan"), r"dropout=nan\): .*must be .*\[0, 1\]"),
    ("seed", None, r"seed=None\): must be an int64 number"),
    ("seed", torch.empty(0, dtype=torch.int64), r"seed\.shape=\(0,\)\): must be one number"),
    ("seed", torch.ones(2, dtype=torch.int64), r"seed\.shape=\(2,\)\): must be one number"),
    ("seed", torch.ones((), dtype=torch.int8), r"seed\.dtype=torch\.int8\): must be torch\.int64"),
    ("seed", torch.ones(()), r"seed\.dtype=torch\.float32\): must be torch\.int64"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [(name, *case) for name in WHERE for case in NUMBERS if case[0] in arguments(name)],
)
def test_a_number_out_of_range_also_without_numbers(name, argument, value, message, device):
    call = arguments(name) | {argument: value}
    call = {k: v.to(device) if isinstance(v, torch.Tensor) and k != "seed" else v for k, v in call.items()}
    with pytest.raises(ValueError, match=rf"^{name}\({message}"):
        getattr(OP, name)(**call)


@pytest.mark.parametrize("name", WHERE)
def test_devices_that_differ(name):
    for argument in ("input", *WHERE[name]):
        call = arguments(name)
        call[argument] = call[argument].to("meta")
        with pytest.raises(ValueError, match=rf"^{name}\(\w+\.device=(cpu|meta)\): must be the device of the input"):
            getattr(OP, name)(**call)


@pytest.mark.parametrize("name", WHERE)
def test_none_for_a_tensor(name):
    for argument in ("input", *(a for a in WHERE[name] if a in ("residual", "dy", "stats"))):
        with pytest.raises(ValueError, match=rf"^{name}\({argument}=None\): must be a tensor\.$"):
            getattr(OP, name)(**arguments(name) | {argument: None})


LOOKS = [
    lambda t: t.repeat_interleave(2, -1)[..., ::2],
    lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
    lambda t: torch.cat([torch.zeros(5), t.flatten()])[5:].view(t.shape),
    lambda t: torch._neg_view(-t),
    lambda t: torch.frombuffer(bytearray(t.nbytes + 1), dtype=t.dtype, offset=1).view(t.shape).copy_(t),
    lambda t: torch._lazy_clone(t),
]


@pytest.mark.parametrize("look", LOOKS, ids=["spaced", "turned", "offset", "negated", "unaligned", "lazy"])
def test_the_same_numbers_in_other_memory(look):
    for name in WHERE:
        call = arguments(name)
        expected = getattr(OP, name)(**call)
        for argument in ("input", *WHERE[name]):
            found = getattr(OP, name)(**call | {argument: look(call[argument])})
            for f, e in zip(found, expected, strict=True):
                torch.testing.assert_close(f, e, atol=1e-5, rtol=1e-5)


# --- the node ---


@needs_node
@pytest.mark.parametrize("library", [0, 12345, None, b"x", "", "/nowhere.so", "a\0b", "\ud800", torch.__file__])
def test_connect_takes_no_other_library(library):
    with pytest.raises((TypeError, ValueError), match=r"^connect\(library=.*\): must be .*extension.*\.$"):
        node.connect(library, _ops._reference_gradients)
    assert LayerNorm(8)(torch.ones(2, 8)).shape == (2, 8)


@needs_node
def test_connect_takes_no_other_reference():
    with pytest.raises(TypeError, match=r"^connect\(reference=5\): must be callable\.$"):
        node.connect(extension.__file__, 5)
    with pytest.raises(TypeError, match=r"^connect\(\): takes 2 arguments, not 1\.$"):
        node.connect(extension.__file__)


@needs_node
@pytest.mark.parametrize("returned", [None, (1, 2, 3, 4), (), [torch.ones(1)] * 4])
def test_a_reference_that_returns_no_gradients(returned):
    x = torch.randn(2, 8, requires_grad=True)
    try:
        node.connect(extension.__file__, lambda *a: returned)
        with pytest.raises(TypeError, match=r"connect\(reference\): must return a tuple of 4 tensors\."):
            torch.autograd.grad(LayerNorm(8)(x).sum(), x, create_graph=True)
    finally:
        node.connect(extension.__file__, _ops._reference_gradients)


@needs_node
def test_before_connect_the_node_refuses():
    code = """
import torch, lightning_optkit._node as node
try:
    node.norm(True, torch.ones(2, 4), (4,), None, None, 1e-5)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "norm(): connect must be called first."


X = torch.ones(2, 4)
NODE_CALLS = [
    ("norm", (True, X), TypeError, r"norm\(\): takes 6 arguments, not 2\."),
    ("norm", ("yes", X, (4,), None, None, 1e-5), TypeError, r"norm\(centered=str\): must be a bool\."),
    ("norm", (True, None, (4,), None, None, 1e-5), TypeError, r"norm\(input=None\): must be a tensor\."),
    ("norm", (True, 5, (4,), None, None, 1e-5), TypeError, r"norm\(input=int\): input must be a tensor\."),
    ("norm", (True, X, (4,), "w", None, 1e-5), TypeError, r"norm\(weight=str\): weight must be a tensor\."),
    ("add_norm", (True, X, None, (4,), None, None, 1e-5, 0.0, None), TypeError, r"add_norm\(residual=None\): must"),
    ("add_norm", (True, X, X, (4,), None, None, 1e-5, 2.0, None), ValueError, r"add_norm\(dropout=2\): must be in"),
    ("add_norm", (True, X, X, (4,), None, None, 1e-5, "x", None), TypeError, r"add_norm\(dropout='x'\): must be a"),
    ("add_norm", (True, X, X, (4,), None, None, 1e-5, 0.5, None), ValueError, r"add_norm\(seed=None\): must be an"),
    ("add_norm", (True, X, X, (4,), None, None, 1e-5, 0.5, 7), TypeError, r"add_norm\(seed=int\): must be an int64"),
    ("add_norm", (True, X, X, (4,), None, None, 1e-5, 0.5, X), ValueError, r"add_norm\(seed=.*\): must be an int64"),
]


@needs_node
@pytest.mark.parametrize(("name", "call", "error", "message"), NODE_CALLS)
def test_the_node_refuses(name, call, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        getattr(node, name)(*call)


class Changes:
    """A size that empties the list it stands in."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __index__(self):
        self.sizes.clear()
        return 4


@needs_node
@pytest.mark.parametrize("sizes", [(5,), (), (4.0,), (2**70,), (2, 4, 4), 4, None, "4", [-4]])
def test_the_node_leaves_to_others_what_does_not_fit(sizes):
    assert node.norm(True, X, sizes, None, None, 1e-5) is None
    changing = []
    changing += [Changes(changing), 4]
    assert node.norm(True, X, changing, None, None, 1e-5) is None


# --- saved tensors, threads ---


@pytest.mark.parametrize("pack", ["double", "half", "transposed", "expanded"])
@pytest.mark.parametrize("module", [LayerNorm(8), AddRMSNorm(8)], ids=["layer", "add rms"])
def test_hooks_may_put_other_memory_in_the_place_of_what_was_saved(module, pack, always_ours):
    x = torch.randn(6, 8).half().float().requires_grad_()
    inputs = (x,) * (1 + isinstance(module, AddRMSNorm))
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    expected = torch.autograd.grad(first(module(*inputs)).square().sum(), [x, module.weight])
    change = {
        "double": lambda t: t.double(),
        "half": lambda t: t.half(),
        "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        "expanded": lambda t: t.unsqueeze(-1).expand(*t.shape, 2)[..., 0],
    }[pack]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
        y = first(module(*inputs))
        found = torch.autograd.grad(y.square().sum(), [x, module.weight])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=1e-2, rtol=1e-2)


def test_hooks_that_lose_rows_are_refused(always_ours):
    x = torch.randn(6, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t[:1]):
        y = LayerNorm(8)(x)
    with pytest.raises(ValueError, match=r"^norm_backward\(\w+\.shape="):
        y.sum().backward()


@pytest.mark.parametrize("make", [lambda: LayerNorm(300), lambda: AddRMSNorm(300, dropout=0.25)])
def test_threads_share_a_layer(make, always_ours):
    module = make()
    x = [torch.randn(120, 300) for _ in range(4)]
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731

    def run(t):
        leaf = t.clone().requires_grad_()
        inputs = (leaf,) if type(module) is LayerNorm else (leaf, leaf)
        y = first(module(*inputs))
        return y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, module.weight])

    module.eval()
    expected = [run(t) for t in x]
    failed = []

    def work(k):
        try:
            for _ in range(20):
                assert all(torch.equal(f, e) for f, e in zip(run(x[k]), expected[k], strict=True))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_freed_gradient_is_refused(always_ours):
    x = torch.randn(6, 8, requires_grad=True)
    y = LayerNorm(8)(x)
    with pytest.raises(ValueError, match=r"^norm_backward\(dy\.untyped_storage\(\)\.nbytes\(\)=0\): must be the 192"):
        torch.autograd.grad(y, x, freed(torch.ones(6, 8)))


def test_a_parameter_freed_before_the_backward_is_refused(always_ours):
    x = torch.randn(6, 8, requires_grad=True)
    weight = nn.Parameter(torch.ones(8))
    module = LayerNorm(8)
    module.weight = weight
    y = module(x)
    freed(weight.data)
    with pytest.raises(
        ValueError, match=r"^norm_backward\(weight\.untyped_storage\(\)\.nbytes\(\)=0\): must be the 32"
    ):
        y.sum().backward()
