# SPDX-License-Identifier: Apache-2.0
"""Tensors other than plain memory, in the layers: torch's results or a clear error, never a crash."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.testing._internal.two_tensor import TwoTensor

from lightning_optkit.layers import (
    AddLayerNorm,
    AddRMSNorm,
    LayerNorm,
    RMSNorm,
    _dispatch,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    rms_norm,
)

FUNCTIONS = {"layer": layer_norm, "rms": rms_norm, "add_layer": add_layer_norm, "add_rms": add_rms_norm}
SHAPES = {"input": (5, 8), "residual": (5, 8), "weight": (8,), "bias": (8,), "dy": (5, 8)}


def randn(*shape):
    return torch.randn(*shape)


def freed(*shape):
    t = randn(*shape)
    t.untyped_storage().resize_(0)
    return t


def shortened(*shape):
    t = randn(*shape)
    t.untyped_storage().resize_(t.nbytes - 4)
    return t


def unaligned(*shape):
    count = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(4 * count + 1), dtype=torch.float32, offset=1).view(shape).normal_()


def tensors(kind):
    return [name for name in SHAPES if name != "dy" and not (name == "residual" and "add" not in kind)
            and not (name == "bias" and "rms" in kind)]  # fmt: skip


def run(kind, given, theirs=False, dropout=0.0):
    """[y, gradients of what takes part]"""
    leaves = {name: given[name].detach().requires_grad_() for name in tensors(kind)}
    x, residual = leaves["input"], leaves.get("residual")
    parameters = (leaves["weight"], *([leaves["bias"]] if "bias" in leaves else []), 1e-5)
    if theirs:
        norm = F.rms_norm if "rms" in kind else F.layer_norm
        y = norm(x if residual is None else x + residual, (8,), *parameters)
    elif residual is None:
        y = FUNCTIONS[kind](x, (8,), *parameters)
    else:
        y = FUNCTIONS[kind](x, residual, (8,), *parameters, dropout=dropout)[0]
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), given["dy"])]


PLAIN_NUMBERS = {
    "spaced": lambda *s: randn(*s, 2)[..., 0],
    "turned": lambda *s: randn(*s[::-1]).T if len(s) == 2 else randn(*s),
    "offset": lambda *s: randn(100)[3 : 3 + torch.Size(s).numel()].view(s),
    "expanded": lambda *s: randn(1).expand(s),
    "expanded rows": lambda *s: randn(s[-1]).expand(s),
    "overlapping": lambda *s: randn(100).as_strided(s, (1,) * len(s)),
    "overlapping columns": lambda *s: randn(100).as_strided(s, (1, 2)[: len(s)]),
    "negated": lambda *s: torch._neg_view(randn(*s)),
    "imaginary part of a conjugate": lambda *s: torch.conj(torch.randn(*s, dtype=torch.complex64)).imag,
    "unaligned": unaligned,
    "zero": lambda *s: torch._efficientzerotensor(s),
    "lazy": lambda *s: torch._lazy_clone(randn(*s)),
}


@pytest.mark.parametrize("memory", PLAIN_NUMBERS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_any_memory_gives_the_numbers_of_fp64(kind, memory, always_ours):
    for where in (*tensors(kind), "dy"):
        torch.manual_seed(1)
        given = {name: randn(*shape) for name, shape in SHAPES.items()}
        given[where] = PLAIN_NUMBERS[memory](*SHAPES[where])
        exact = run(kind, {name: t.clone().double() for name, t in given.items()}, theirs=True)
        for found, e in zip(run(kind, given), exact, strict=True):
            # Rows of equal numbers stretch rounding by 1 / sqrt(eps).
            torch.testing.assert_close(found.double(), e, atol=2e-3, rtol=1e-4)


OTHERS = {
    "two tensors": lambda *s: TwoTensor(randn(*s), randn(*s)),
    "meta": lambda *s: torch.empty(s, device="meta"),
}


@pytest.mark.parametrize("memory", OTHERS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_tensors_without_memory_take_the_formula_of_torch(kind, dropout, memory, always_ours):
    given = {name: OTHERS[memory](*shape) for name, shape in SHAPES.items()}
    expected = run(kind, given, theirs=True)
    for found, e in zip(run(kind, given, dropout=dropout if "add" in kind else 0.0), expected, strict=True):
        assert type(found) is type(e) and found.shape == e.shape
        if memory == "two tensors" and dropout == 0.0:
            for part in ("a", "b"):
                torch.testing.assert_close(getattr(found, part), getattr(e, part), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_one_wrapper_among_plain_tensors(kind, where, always_ours):
    given = {name: randn(*shape) for name, shape in SHAPES.items()}
    given[where] = TwoTensor(given[where], given[where].clone())
    given["dy"] = TwoTensor(given["dy"], given["dy"])
    found = run(kind, given)
    expected = run(kind, {name: t.a if isinstance(t, TwoTensor) else t for name, t in given.items()}, theirs=True)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.a if isinstance(f, TwoTensor) else f, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_fake_tensors(kind, dropout, always_ours):
    with FakeTensorMode() as mode:
        given = {name: torch.empty(shape) for name, shape in SHAPES.items()}
        for found, name in zip(run(kind, given, dropout=dropout), ["dy", *tensors(kind)], strict=True):
            assert found.fake_mode is mode and found.shape == SHAPES[name]


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_jagged_rows(kind, always_ours):
    parts = [randn(2, 8), randn(3, 8)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    weight, residual = randn(8), [] if "add" not in kind else [jagged * 2]
    y = FUNCTIONS[kind](jagged, *residual, (8,), weight, eps=1e-5)
    norm = F.rms_norm if "rms" in kind else F.layer_norm
    for found, part in zip((y[0] if residual else y).unbind(), parts, strict=True):
        expected = norm(part * (3 if residual else 1), (8,), weight, eps=1e-5)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("kind", ["add_layer", "add_rms"])
def test_dropout_in_a_batch(kind, randomness, always_ours):
    call = lambda x: FUNCTIONS[kind](x, torch.zeros(5, 8), (8,), dropout=0.5)[1]  # noqa: E731
    totals = torch.func.vmap(call, randomness=randomness)(torch.ones(3, 5, 8))
    assert set(totals.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(totals[0], totals[1]) == (randomness == "same")


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_sparse_residual_or_gradient(kind, always_ours):
    given = {name: randn(*shape) for name, shape in SHAPES.items()}
    given["dy"][1:4] = 0.0
    expected = run(kind, given, theirs=True)
    for where in ("dy", "residual"):
        for found, e in zip(run(kind, given | {where: given[where].to_sparse()}), expected, strict=True):
            torch.testing.assert_close(found.to_dense(), e, atol=1e-5, rtol=1e-5)


REFUSED = [
    ("sparse", lambda *s: randn(*s).to_sparse(), ValueError, r"\.layout=torch\.sparse_coo\): must be torch\.strided\."),
    ("mkldnn", lambda *s: randn(*s).to_mkldnn(), ValueError, r"\.layout=torch\._mkldnn\): must be torch\.strided\."),
    ("complex", lambda *s: torch.randn(*s, dtype=torch.complex64).conj(), ValueError, r"\.dtype=torch\.complex64\): "),
    ("integers", lambda *s: torch.ones(s, dtype=torch.int32), ValueError, r"\.dtype=torch\.int32\): \w+ must be fl"),
    ("eight bits", lambda *s: randn(*s).to(torch.float8_e5m2), ValueError, r"\.dtype=torch\.float8_e5m2\): must be"),
    ("freed", freed, ValueError, r"\.untyped_storage\(\)\.nbytes\(\)=0\): must be the \d+ bytes that its shape and"),
    ("shortened", shortened, ValueError, r"\.untyped_storage\(\)\.nbytes\(\)=\d+\): must be the \d+ bytes that its"),
    ("meta", lambda *s: torch.empty(s, device="meta"), ValueError, r"\.device=(cpu|meta)\): must be the device of the"),
    ("none", lambda *s: None, TypeError, r"=None\): \w+ must be a tensor\."),
    ("a number", lambda *s: 5, TypeError, r"=5\): \w+ must be a tensor\."),
]


@pytest.mark.parametrize(("make", "error", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_what_is_refused_says_so_in_one_sentence(kind, make, error, message, always_ours):
    for where in tensors(kind):
        given = {name: randn(*SHAPES[name]) for name in tensors(kind)}
        given[where] = make(*SHAPES[where])
        if given[where] is None and where in ("weight", "bias"):
            continue  # no parameter
        if where == "residual" and torch.is_tensor(given[where]) and given[where].is_sparse:
            continue  # torch adds a sparse residual to a dense input
        tensor_arguments = [given.pop("input"), *([given.pop("residual")] if "residual" in given else [])]
        named = r"\w+" if "device" in message else where
        with pytest.raises(error, match=rf"^{kind}_norm\({named}{message}"):
            FUNCTIONS[kind](*tensor_arguments, (8,), **given)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize(
    ("kind", "where"),
    [("layer", "input"), ("layer", "weight"), ("rms", "input"), ("add_layer", "weight"), ("add_rms", "input")],
)
def test_a_type_that_torch_does_not_normalize(kind, where, always_ours):
    given = {name: randn(*SHAPES[name]) for name in tensors(kind)}
    given[where] = masked_tensor(given[where], given[where] > 0)
    inputs = [given[name] for name in ("input", "residual") if name in given]
    with pytest.raises(TypeError, match=rf"^{kind}_norm\({where}=MaskedTensor\): torch's own formula") as caught:
        FUNCTIONS[kind](*inputs, (8,), given["weight"])
    assert "\n" not in str(caught.value)


KINDS = [
    (dict(normalized_shape=8), TypeError, r"normalized_shape=8\): must be a tuple or list of integers"),
    (dict(normalized_shape="8"), TypeError, r"normalized_shape='8'\): must be a tuple or list of integers"),
    (dict(normalized_shape=None), TypeError, r"normalized_shape=None\): must be a tuple or list of integers"),
    (dict(normalized_shape={8}), TypeError, r"normalized_shape=\{8\}\): must be a tuple or list of integers"),
    (dict(normalized_shape=(8.0,)), TypeError, r"normalized_shape=8\.0\): normalized_shape must be an integer"),
    (dict(normalized_shape=(True,)), TypeError, r"normalized_shape=True\): normalized_shape must be an integer"),
    (dict(normalized_shape=("8",)), TypeError, r"normalized_shape='8'\): normalized_shape must be an integer"),
    (dict(normalized_shape=()), ValueError, r"normalized_shape=\(\)\): normalized_shape must hold at least one size"),
    (dict(normalized_shape=(0,)), ValueError, r"normalized_shape=0\): normalized_shape must be an integer >= 1"),
    (dict(normalized_shape=(4,)), ValueError, r"input\.shape=\(5, 8\)\): the last dimensions must be \(4,\)"),
    (
        dict(normalized_shape=(2**70,)),
        ValueError,
        rf"normalized_shape={2**70}\): normalized_shape must be an integer >= 1",
    ),
    (dict(normalized_shape=(5, 5, 8)), ValueError, r"input\.shape=\(5, 8\)\): the last dimensions must be"),
    (dict(eps="x"), TypeError, r"eps='x'\): eps must be a number in \[0, inf\)"),
    (dict(eps=-1.0), ValueError, r"eps=-1\.0\): eps must be in \[0, inf\)"),
    (dict(eps=float("nan")), ValueError, r"eps=nan\): eps must be in \[0, inf\)"),
    (dict(eps=[1e-5]), TypeError, r"eps=\[1e-05\]\): eps must be a number in \[0, inf\)"),
    (dict(weight=[1.0]), TypeError, r"weight=\[1\.0\]\): weight must be a tensor"),
    (dict(weight=torch.ones(4)), ValueError, r"weight\.shape=\(4,\)\): must be normalized_shape, \(8,\)"),
]


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize(("change", "error", "message"), KINDS, ids=[str(case[0])[:40] for case in KINDS])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_wrong_kinds_and_values(kind, change, error, message, with_weight, always_ours):
    weight = torch.ones(8) if with_weight else None
    given = dict(input=randn(5, 8), normalized_shape=(8,), weight=weight, eps=1e-5)
    given |= dict(residual=randn(5, 8)) if "add" in kind else {}
    with pytest.raises(error, match=rf"^{kind}_norm\({message}.*\.$"):
        FUNCTIONS[kind](**given | change)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm, AddLayerNorm, AddRMSNorm])
@pytest.mark.parametrize(("eps", "error"), [("x", TypeError), (-1.0, ValueError), (float("nan"), ValueError)])
def test_a_wrong_eps_raises_at_construction(cls, eps, error):
    with pytest.raises(error, match=rf"^{cls.__name__}\(eps={re.escape(repr(eps))}\): eps must be "):
        cls(8, eps=eps)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("eps", [torch.ones(2, 3), torch.ones(1, dtype=torch.complex64), torch.ones((), device="meta")])
def test_a_tensor_that_is_no_number_is_no_eps(cls, eps):
    with pytest.raises(TypeError, match=rf"^{cls.__name__}\(eps=<Tensor.*>\): eps must be a number in \[0, inf\)\.$"):
        cls(4, eps=eps)


@pytest.mark.parametrize("kind", ["layer", "add_layer"])
def test_layer_norm_has_no_eps_of_its_own(kind, always_ours):
    inputs = (randn(5, 8),) * (1 + ("add" in kind))
    with pytest.raises(TypeError, match=rf"^{kind}_norm\(eps=None\): eps must be a number in \[0, inf\)\.$"):
        FUNCTIONS[kind](*inputs, (8,), eps=None)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_small_inputs_without_the_node(kind, monkeypatch):
    monkeypatch.setattr(_dispatch, "node", None)
    given = {name: randn(*shape) for name, shape in SHAPES.items()}
    for found, e in zip(run(kind, given), run(kind, given, theirs=True), strict=True):
        torch.testing.assert_close(found, e, atol=1e-5, rtol=1e-5)
    inputs = [given[name] for name in ("input", "residual") if name in tensors(kind)]
    call = lambda *t: FUNCTIONS[kind](*t, (8,), given["weight"])  # noqa: E731
    first = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731
    rows = torch.func.vmap(lambda *t: first(call(*t)))(*inputs)
    torch.testing.assert_close(rows, first(call(*inputs)), atol=1e-5, rtol=1e-5)
    given["weight"] = freed(8)
    with pytest.raises(ValueError, match=rf"^{kind}_norm\(weight\.untyped_storage\(\)\.nbytes\(\)=0\): must be the 32"):
        call(*inputs)
