# SPDX-License-Identifier: Apache-2.0
"""Tensors without plain memory: the reference path, the right result, or a clear error; never foreign memory."""

import re
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipUnitwise
from lightning_optkit.optimizers import LAMB, SGD, Adafactor, AdamW, Lion, Muon, NAdam, Prodigy, ScheduleFreeAdamW

# --- the lazy negation bit ---


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("clip", [None, ClipNorm(1.0), ClipUnitwise(0.1)], ids=repr)
@pytest.mark.parametrize("cls", [SGD, AdamW, Lion])
@pytest.mark.parametrize("where", ["gradient", "parameter", "both"])
def test_a_lazily_negated_tensor_is_taken_at_its_value(where, cls, clip, fused):
    values = [torch.randn(5, 6) for _ in range(2)]

    def run(negate):
        lazy = (lambda t: torch._neg_view(-t)) if negate else (lambda t: t.clone())
        p = torch.nn.Parameter(lazy(values[0]) if where != "gradient" else values[0].clone())
        optimizer = cls([p], lr=0.1, clip=clip, average=EMA(0.5), fused=fused)
        for _ in range(3):
            p.grad = lazy(values[1]) if where != "parameter" else values[1].clone()
            optimizer.step()
        return [p.detach().resolve_neg(), optimizer.state[p]["ema"]]

    torch.testing.assert_close(run(True), run(False))


def test_autograd_makes_negated_gradients_by_itself():
    a, b = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(0.5))
    (torch.complex(a, b).conj() * (1 + 2j)).real.backward()
    assert b.grad.is_neg()
    SGD([a, b], lr=0.1).step()
    torch.testing.assert_close(b.detach(), torch.tensor(0.5 - 0.1 * b.grad.item()))


@pytest.mark.parametrize("cls", [SGD, AdamW])
def test_a_conjugated_gradient_of_a_complex_parameter_is_taken_at_its_value(cls):
    theirs = {SGD: torch.optim.SGD, AdamW: torch.optim.AdamW}[cls]
    grad = torch.randn(4, dtype=torch.complex64)
    stepped = []
    for kind in (cls, theirs):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.complex64))
        p.grad = grad.conj() if kind is cls else grad.conj().resolve_conj()
        kind([p], lr=0.1).step()
        stepped.append(p.detach())
    torch.testing.assert_close(*stepped)


def test_explain_says_that_a_negated_parameter_takes_the_reference_path():
    p = torch.nn.Parameter(torch._neg_view(torch.ones(3)))
    p.grad = torch.ones(3)
    assert "reference: its negation bit is set" in str(SGD([p]).explain())


# --- wrapper subclasses ---


@pytest.mark.parametrize("clip", [None, ClipNorm(100.0)], ids=repr)
@pytest.mark.parametrize(("cls", "theirs"), [(SGD, torch.optim.SGD), (AdamW, torch.optim.AdamW)])
def test_a_wrapper_subclass_is_stepped_as_torch_steps_it(cls, theirs, clip):
    stepped = []
    for kind, kwargs in ((cls, dict(clip=clip)), (theirs, {})):
        p = torch.nn.Parameter(TwoTensor(torch.ones(5), torch.full((5,), 2.0)))
        optimizer = kind([p], lr=0.1, **kwargs)
        for _ in range(3):
            p.grad = TwoTensor(torch.ones(5), torch.ones(5))
            optimizer.step()
        stepped.append([p.a.detach(), p.b.detach()])
    torch.testing.assert_close(*stepped)


def test_explain_names_the_wrapper_subclass():
    p = torch.nn.Parameter(TwoTensor(torch.ones(5), torch.ones(5)))
    p.grad = TwoTensor(torch.ones(5), torch.ones(5))
    assert "reference: a TwoTensor has no plain memory of its own" in str(SGD([p]).explain())


def test_a_parameter_swapped_for_a_wrapper_subclass_takes_the_reference_path():
    p = torch.nn.Parameter(torch.ones(5))
    optimizer = SGD([p], lr=0.1)
    p.grad = torch.ones(5)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(TwoTensor(torch.ones(5), torch.ones(5))))
    p.grad = TwoTensor(torch.ones(5), torch.ones(5))
    optimizer.step()
    torch.testing.assert_close(p.a.detach(), torch.full((5,), 0.9))


class Borrowing(torch.nn.Parameter):
    """A parameter that returns any given gradient."""

    grad = property(lambda self: self.borrowed)


GRADIENTS = {
    "a wrapper subclass": lambda: TwoTensor(torch.ones(5), torch.ones(5)),
    "fake": lambda: fake(5),
    "meta": lambda: torch.ones(5, device="meta"),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "another shape": lambda: torch.ones(4),
    "complex": lambda: torch.ones(5, dtype=torch.complex64),
    "quantized": lambda: quantized(),
    "no tensor": lambda: "gradient",
}


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)


def fake(*shape):
    with FakeTensorMode():
        return torch.ones(*shape)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("what", GRADIENTS)
def test_a_gradient_without_numbers_for_its_parameter_is_refused_in_a_sentence(what, fused, frozen):
    p = Borrowing(torch.ones(5))
    p.borrowed = GRADIENTS[what]()
    optimizer = SGD([p], momentum=0.9, fused=fused)
    before = frozen(p)
    with pytest.raises((ValueError, TypeError), match=r"^SGD\.step: a gradient .*\.$"):
        optimizer.step()
    assert frozen(p) == before


# --- no numbers at all ---


@pytest.mark.parametrize("cls", [SGD, AdamW, Adafactor])
def test_parameters_without_numbers_are_refused_in_a_sentence(cls):
    p = torch.nn.Parameter(torch.ones(5, 3, device="meta"))
    p.grad = torch.ones(5, 3, device="meta")
    with pytest.raises(ValueError, match=r"\.step: a parameter of shape \[5, 3\] is on the meta device"):
        cls([p]).step()
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(5, 3))
        p.grad = torch.ones(5, 3)
        with pytest.raises(ValueError, match=r"\.step: a parameter of shape \[5, 3\] is a FakeTensor"):
            cls([p]).step()


ODD_PARAMETERS = {
    "int64": (lambda: torch.arange(4), "holds int64; it must hold floating-point or complex numbers"),
    "bool": (lambda: torch.ones(4, dtype=torch.bool), "holds bool; it must hold floating-point or complex numbers"),
    "uint8": (lambda: torch.ones(4, dtype=torch.uint8), "holds uint8; it must hold floating-point or complex numbers"),
    "expanded": (lambda: torch.ones(1).expand(4), "is expanded: several of its elements are one number in memory"),
    "expanded rows": (lambda: torch.ones(1, 3).expand(2, 3), "is expanded: several of its elements are one number"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "is sparse_coo; only its gradient may be"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "is sparse_csr; only its gradient may be"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "is nested",
    ),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.nested.*", "ignore:Sparse CSR tensor support.*", "ignore:.*nested tensors.*"
)
@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("what", ODD_PARAMETERS)
def test_a_parameter_that_no_step_can_write_is_refused_before_any_is_moved(what, fused):
    make, reason = ODD_PARAMETERS[what]
    odd, plain = make(), torch.nn.Parameter(torch.ones(3))
    odd.grad = odd.detach().clone()
    plain.grad = torch.ones(3)
    optimizer = SGD([plain, odd], lr=0.1, momentum=0.9, fused=fused)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(reason)):
            optimizer.step()
    assert plain.tolist() == [1, 1, 1]
    assert not optimizer.state


@pytest.mark.parametrize("cls", [AdamW, Adafactor, Muon, Lion])
def test_integers_are_refused_by_every_kind_of_rule(cls):
    p = torch.ones(4, 4, dtype=torch.int32)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\.step: a parameter of shape \[4, 4\] holds int32"):
        cls([p]).step()
    assert (p == 1).all()


# --- inside torch.func, and under another default device ---


@pytest.mark.parametrize("stepped_before", [False, True])
def test_a_step_inside_a_transform_is_refused_and_one_after_it_works(stepped_before):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.5, momentum=0.9)

    def loss(x):
        p.grad = x * 1.0
        optimizer.step()
        return x.sum()

    if stepped_before:
        p.grad = torch.zeros(3)
        optimizer.step()
    for transform in (torch.func.grad, torch.func.vjp):
        with pytest.raises(RuntimeError, match=r"^SGD\.step: called inside a transform of torch\.func"):
            transform(loss)(torch.ones(3)) if transform is torch.func.grad else transform(loss, torch.ones(3))
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [0.5, 0.5, 0.5]


def test_parameters_of_a_vmap_are_refused_in_a_sentence():
    def stepped(x):
        optimizer = SGD([x], lr=0.1)
        x.grad = x * 1
        optimizer.step()
        return x

    with pytest.raises(RuntimeError, match=r"^SGD\.step: called inside a transform of torch\.func"):
        torch.func.vmap(stepped)(torch.ones(2, 3))


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("cls", [AdamW, NAdam, Adafactor, Muon, Prodigy, ScheduleFreeAdamW, LAMB])
def test_the_default_device_is_not_asked(cls, fused):
    if cls is Adafactor and fused is False:
        pytest.skip("takes no such argument, as torch's")
    pair = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    rules = {} if cls is Adafactor else {"fused": fused}
    for p, device in zip(pair, ["cpu", "meta"], strict=True):
        optimizer = cls([p], lr=0.1, clip=ClipNorm(1.0), average=None if "Free" in cls.__name__ else EMA(0.9), **rules)
        getattr(optimizer, "train", lambda: None)()
        for _ in range(3):
            p.grad = torch.full((3, 3), 2.0, device="cpu")
            with torch.device(device):
                optimizer.step()
    assert torch.equal(*pair)


# --- a gradient that lies in its own parameter ---


@pytest.mark.parametrize("cls", [SGD, AdamW, Lion])
@pytest.mark.parametrize("shift", [1, -1, 7, 500])
def test_a_gradient_that_lies_partly_in_its_parameter_is_read_before_it_is_written(cls, shift):
    def buffers():
        memory = torch.arange(3.0, 2503.0)
        return memory[500:1501], memory[500 + shift : 1501 + shift]

    data, grad = buffers()
    p, apart = torch.nn.Parameter(data), torch.nn.Parameter(data.clone())
    p.grad, apart.grad = grad, grad.clone()
    for each in (p, apart):
        cls([each], lr=0.1).step()
    assert torch.equal(p, apart)


# --- memory that is shared or special ---


def test_a_copy_on_write_parameter_leaves_its_source_alone():
    source = torch.ones(1000)
    p = torch.nn.Parameter(torch._lazy_clone(source))
    optimizer = SGD([p], lr=0.5)
    p.grad = torch.ones(1000)
    optimizer.step()
    assert torch.equal(source, torch.ones(1000))
    assert torch.equal(p.detach(), torch.full((1000,), 0.5))


@pytest.mark.parametrize(
    "grad",
    [
        torch.ones(1).expand(1000),
        torch.ones(2000)[::2],
        torch.ones(1001)[1:],
        torch.ones(1000).bfloat16(),
        torch.ones(1000).to_sparse(),
    ],
    ids=["expanded", "gapped", "offset", "bf16", "sparse"],
)
def test_a_gradient_in_other_memory_is_taken_at_its_value(grad):
    p = Borrowing(torch.ones(1000))
    p.borrowed = grad
    SGD([p], lr=0.5).step()
    assert torch.equal(p.detach(), torch.full((1000,), 0.5))


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: torch.ones(3), True),
        (lambda: torch.nn.Parameter(torch.ones(3)), True),
        (lambda: torch.ones(3).as_subclass(type("Sub", (torch.Tensor,), {})), True),
        (lambda: torch.ones(0), True),
        (lambda: torch.ones(()).bfloat16(), True),
        (lambda: torch.ones(3, dtype=torch.uint8), True),
        (lambda: torch.ones(3, dtype=torch.int32), False),
        (lambda: torch.ones(3, dtype=torch.complex64), False),
        (lambda: torch._neg_view(torch.ones(3)), False),
        (lambda: torch.ones(3, device="meta"), False),
        (lambda: torch.ones(3).to_sparse(), False),
        (lambda: TwoTensor(torch.ones(3), torch.ones(3)), False),
        (lambda: fake(3), False),
        (lambda: None, False),
        (lambda: 3.0, False),
        (lambda: torch.ones, False),
    ],
)
@pytest.mark.parametrize("by_headers", [True, False])
def test_what_is_plain_memory(make, expected, by_headers):
    from lightning_optkit._native import node

    if by_headers and node is None:
        pytest.skip("no look by torch's headers")
    extension.use_look(node.look if by_headers else None)
    try:
        assert extension.is_plain(make()) is expected
    finally:
        extension.use_look(None if node is None else node.look)
