# SPDX-License-Identifier: Apache-2.0
"""Parameters that a clip leaves out, inside of the step, against the clip as a pass of its own over the others."""

import copy
import math
import pickle

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip
from lightning_optkit.optimizers import LAMB, SGD, SOAP, AdamW, Muon
from lightning_optkit.step.in_backward import step_in_backward

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
SHAPES = [(40, 50), (1641,), (5, 7), (3, 2, 4), (), (0, 3), (16, 16)]
LEFT_OUT = (0, 2, 4)
CLIPS = [
    ClipUnitwise(0.02),
    ClipPerTensor(0.5),
    ClipNorm(0.5),
    ClipValue(0.01),
    AutoClip(30),
    ZClip(0.5, alpha=0.5, warmup_steps=2),
]


def gradient(p):
    return (torch.randn(p.shape, dtype=torch.float64) * 10 ** torch.empty(()).uniform_(-3, 1)).to(p.dtype)


def folded_and_called(make, clip, dtype=torch.float32, steps=6):
    """The parameters of a run with the clip in the step, and those of one that calls it before."""
    torch.manual_seed(0)
    ours = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in SHAPES]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer, other, called = make(ours, clip=copy.deepcopy(clip)), make(theirs), copy.deepcopy(clip)
    left_out = {ours[place] for place in LEFT_OUT}
    optimizer.leaves_out = lambda: left_out
    for _ in range(steps):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = gradient(p)
            q.grad = p.grad.clone()
        clipped = [q for place, q in enumerate(theirs) if place not in LEFT_OUT]
        norm = called(clipped)
        norm_clipped = torch.nn.utils.get_total_norm([q.grad for q in clipped])
        optimizer.step()
        other.step()
        if dtype != torch.bfloat16 and called.needs_norm:
            found = optimizer.grad_norm, optimizer.grad_norm_clipped
            assert found == pytest.approx((float(norm), float(norm_clipped)), rel=1e-5)
    return ours, theirs


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: type(clip).__name__)
def test_what_is_left_out_moves_as_without_a_clip_and_the_rest_as_with_the_clip_called(clip, dtype, fused):
    def make(params, **clip):
        return AdamW(params, lr=0.01, average=EMA(0.9), fused=fused, **clip)

    ours, theirs = folded_and_called(make, clip, dtype)
    for place, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        if place in LEFT_OUT:
            assert torch.equal(p, q)
        else:  # a clip that is called adds squares of 32 bits in 32 bits, and rounds what it writes to bfloat16
            tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.04}[dtype]
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("rule", [SGD, LAMB, Muon, SOAP])
def test_on_every_kind_of_rule(rule):
    ours, theirs = folded_and_called(lambda p, **clip: rule(p, lr=0.01, **clip), ClipUnitwise(0.02), steps=2)
    assert all(torch.equal(ours[place], theirs[place]) for place in LEFT_OUT)


@PATHS
def test_where_norms_are_exact_so_are_all_bits_of_unitwise_clipping(fused):
    rows = torch.tensor([[3.0, 4.0, 12.0, 84.0], [0.0, -5.0, 12.0, 0.0], [8.0, 0.0, 0.0, -15.0]])
    scales = torch.tensor([[1.0], [0.25], [8.0]])
    p, q, head, other = (torch.nn.Parameter(rows.flip(1) * scales) for _ in range(4))
    for each in (p, q, head, other):
        each.grad = rows * 2.0
    optimizer = SGD([p, head], lr=0.1, clip=ClipUnitwise(0.3), fused=fused)
    optimizer.leaves_out = lambda: {head}
    optimizer.step()
    ClipUnitwise(0.3)([q])
    SGD([q, other], lr=0.1, fused=fused).step()
    assert torch.equal(p, q) and torch.equal(head, other) and not torch.equal(p, head)


@PATHS
def test_a_scaled_gradient_that_is_left_out_is_unscaled(fused):
    moved = []
    for scale in (1.0, 8.0):
        body, head = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        optimizer = SGD([body, head], lr=1.0, clip=ClipNorm(0.5), fused=fused)
        optimizer.leaves_out = lambda head=head: {head}
        optimizer.grad_scale = torch.tensor(scale)
        body.grad, head.grad = torch.tensor([3.0, 4.0]) * scale, torch.tensor([3.0, 4.0]) * scale
        optimizer.step()
        moved.append((body.tolist(), head.tolist()))
    assert moved[0] == moved[1] and moved[0][1] == [-2.0, -3.0] and moved[0][0] == pytest.approx([0.7, 0.6])


def test_a_clip_learns_nothing_where_only_what_is_left_out_has_a_gradient():
    body, head = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([body, head], lr=0.1, clip=AutoClip(50))
    optimizer.leaves_out = lambda: {head}
    head.grad = torch.full((3,), 1e3)
    optimizer.step()
    assert optimizer.clip.state_dict()["seen"] == 0 and optimizer.num_steps == 1 and optimizer.num_clipped == 0
    assert torch.equal(head.data, torch.full((3,), 1 - 100.0))


@pytest.mark.parametrize("clip", [ClipUnitwise(0.02), ClipNorm(0.5)], ids=str)
def test_a_non_finite_gradient_that_is_left_out_skips_the_step(clip):
    body, head = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([body, head], lr=0.1, clip=clip)
    optimizer.leaves_out = lambda: {head}
    body.grad, head.grad = torch.ones(3), torch.full((3,), math.nan)
    optimizer.step()
    assert optimizer.num_skipped == 1 and torch.equal(body, torch.ones(3)) and torch.equal(head, torch.ones(3))


def test_it_is_asked_again_when_the_parameters_change():
    old, new = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer, named = SGD([old], lr=1.0, clip=ClipPerTensor(0.5)), {old}
    optimizer.leaves_out = lambda: set(named)
    old.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert old.tolist() == [-3.0, -4.0]
    optimizer.param_groups[0]["params"] = [new]  # a head was replaced by hand
    named = {new}
    new.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert new.tolist() == [-3.0, -4.0]
    optimizer.leaves_out = None
    optimizer.step()
    torch.testing.assert_close(new.data, torch.tensor([-3.3, -4.4]))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_leaves_out_its_own_parameters(copied):
    body, head = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = SGD([body, head], lr=1.0, clip=ClipPerTensor(0.5))
    left_out = {head}
    optimizer.leaves_out = left_out.copy
    again = copied(optimizer)
    of_body, of_head = again.param_groups[0]["params"]
    of_body.grad, of_head.grad = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
    again.step()
    assert of_head.tolist() == [-3.0, -4.0] and float(of_body.detach().norm()) == pytest.approx(0.5, rel=1e-5)


def test_in_the_backward_pass():
    body, head = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([body, head], lr=1.0, clip=ClipPerTensor(0.5))
    optimizer.leaves_out = lambda: {head}
    step_in_backward(optimizer)
    (body @ torch.tensor([3.0, 4.0]) + head @ torch.tensor([3.0, 4.0])).backward()
    assert head.tolist() == [-2.0, -3.0]
    torch.testing.assert_close(body.data, torch.tensor([0.7, 0.6]))


def test_explain_says_which_are_clipped():
    params = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(3)]
    optimizer = SGD(params, lr=0.1, clip=ClipUnitwise(0.1))
    optimizer.leaves_out = lambda: {params[0]}
    left_out, clipped = optimizer.explain().groups
    assert (left_out.num_tensors, left_out.stages) == (1, ("norm", "update"))
    assert (clipped.num_tensors, clipped.stages) == (2, ("norm", "ClipUnitwise(ratio=0.1, eps=0.001)", "update"))
    assert (left_out.bytes_per_element, clipped.bytes_per_element) == (16, 24)
