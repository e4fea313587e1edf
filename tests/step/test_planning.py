# SPDX-License-Identifier: Apache-2.0
"""When a plan is rebuilt: after any change between two steps, the next one gives torch's result."""

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, AdamW

# --- a parameter in another layout, dtype or shape ---


def transposed(t):
    back = tuple(reversed(range(t.dim())))
    return t.permute(back).contiguous().permute(back)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def gapped(t):
    room = torch.zeros(*t.shape, 2, dtype=t.dtype)
    room[..., 0] = t
    return room[..., 0]


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("layout", [transposed, channels_last, gapped], ids=lambda f: f.__name__)
def test_state_follows_a_parameter_whose_layout_changes(layout, fused):
    ours = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizers = [AdamW([ours], lr=0.1, average=EMA(0.9), fused=fused), torch.optim.AdamW([theirs], lr=0.1)]
    for step in range(4):
        if step == 2:
            ours.data = layout(ours.detach())
        theirs.grad = torch.randn_like(theirs)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.timeout(5)
def test_a_square_parameter_transposed_in_place_is_walked_in_its_new_order():
    ours = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizers = [AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)]
    for step in range(3):
        if step == 2:  # the same memory, other strides
            ours.data, theirs.data = ours.data.t(), theirs.data.t()
        theirs.grad = torch.randn(4, 4, dtype=torch.float64)
        ours.grad = theirs.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# --- parameters, groups and state replaced by hand ---


def four_steps(change, optimizer_class, params, **kwargs):
    """Four steps of fixed gradients; `change(optimizer, params)` after the second."""
    generator = torch.Generator().manual_seed(0)
    optimizer = optimizer_class(params, lr=0.1, **kwargs)
    for step in range(4):
        if step == 2:
            params = change(optimizer, params) or params
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return params


def added_group(optimizer, params):
    new = torch.ones(5, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group(dict(params=[new], lr=0.3))
    return [*params, new]


def replaced_parameter(optimizer, params):
    params = [*params[:1], params[1].detach().clone().requires_grad_(), *params[2:]]
    optimizer.param_groups[0]["params"][1] = params[1]
    return params


def forgotten_state(optimizer, params):
    del optimizer.state[params[1]]


def emptied_state(optimizer, params):
    optimizer.state.clear()


def replaced_state_tensor(optimizer, params):
    state = optimizer.state[params[1]]
    state["exp_avg"] = torch.ones_like(state["exp_avg"])  # the old one is freed: a plan must not point there


def written_state_tensor(optimizer, params):
    optimizer.state[params[1]]["exp_avg"].fill_(1.0)


def reset_step(optimizer, params):
    optimizer.state[params[0]]["step"] = torch.tensor(0.0)


CHANGES = [
    added_group,
    replaced_parameter,
    forgotten_state,
    emptied_state,
    replaced_state_tensor,
    written_state_tensor,
    reset_step,
]


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_sees_what_changed_between_two_steps_as_torch_does(change, fused):
    # Large enough that memory that is freed goes back to the system, and a write to it is a crash.
    values = [torch.randn(300_000, dtype=torch.float64) for _ in range(3)]
    ours = four_steps(change, AdamW, [v.clone().requires_grad_() for v in values], fused=fused)
    theirs = four_steps(change, torch.optim.AdamW, [v.clone().requires_grad_() for v in values])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_a_parameter_that_outgrew_its_state_is_refused_before_anything_is_touched(fused, frozen):
    p = torch.ones(2, requires_grad=True)
    optimizer = AdamW([p], fused=fused)
    p.grad = torch.ones(2)
    optimizer.step()
    p.grad, p.data = None, torch.ones(3)
    p.grad = torch.ones(3)
    before = frozen([p, dict(optimizer.state[p])])
    with pytest.raises((ValueError, RuntimeError), match=r"exp_avg.*shape"):
        optimizer.step()
    assert frozen([p, dict(optimizer.state[p])]) == before


def test_a_parameter_moved_to_another_dtype_keeps_its_fp32_state():
    p = torch.randn(9, requires_grad=True)
    optimizer = AdamW([p], lr=0.1)
    p.grad = torch.ones(9)
    optimizer.step()
    p.grad, p.data = None, p.data.bfloat16()
    p.grad = torch.ones(9, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((9,), 0.19))


def test_without_any_gradient_a_step_does_nothing(snapshot):
    optimizer = AdamW([torch.ones(3, requires_grad=True)], statistics=True)
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before
    assert optimizer.statistics() == [None]


def test_a_compensation_left_from_kahan_rounding_is_checked_too():
    p = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = SGD([p], rounding="kahan")
    optimizer.step()
    optimizer.param_groups[0]["rounding"] = "nearest"
    p.grad = None
    p.data = torch.ones(3, dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"compensation.*shape"):
        optimizer.step()
