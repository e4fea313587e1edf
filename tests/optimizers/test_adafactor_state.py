# SPDX-License-Identifier: Apache-2.0
"""The state of Adafactor is exchanged with torch's, converted, and refused if it does not belong."""

import copy

import pytest
import torch

from lightning_optkit.optimizers import Adafactor
from lightning_optkit.optimizers.convert import from_torch_, to_torch_, why_not_convertible
from tests.optimizers.adafactor_cases import STATES, TOLERANCE, assert_state_close, parameters, short


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("to_torch", [False, True])
def test_a_state_dict_continues_in_the_other_package(train, to_torch, dtype):
    kwargs = dict(lr=0.05, weight_decay=0.1, eps=(None, 0.01), d=2.0, beta2_decay=-0.5)
    ours, theirs, third = parameters(dtype, 3)
    optimizers = [Adafactor(ours, **kwargs), torch.optim.Adafactor(theirs, **kwargs)]
    train(optimizers, [ours, theirs], steps=5)
    source, target_class = (optimizers[0], torch.optim.Adafactor) if to_torch else (optimizers[1], Adafactor)
    resumed = target_class(third, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(source.state_dict()))  # torch would alias these tensors
    for p, q in zip(third, ours, strict=True):
        p.data.copy_(q.detach())
    train([*optimizers, resumed], [ours, theirs, third], steps=5, seed=2)
    torch.testing.assert_close(third, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_state_close(resumed, third, optimizers[1], theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kwargs", [dict(), dict(foreach=True, maximize=True)], ids=short)
def test_converts_and_back(train, kwargs, dtype):
    ours, theirs = parameters(dtype)
    one, other = torch.optim.Adafactor(ours, **kwargs), torch.optim.Adafactor(theirs, **kwargs)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
    train([one, other], [ours, theirs], steps=3)
    from_torch_(one)
    assert type(one) is Adafactor
    train([one, other], [ours, theirs], steps=3, seed=2)
    to_torch_(one)
    assert type(one) is torch.optim.Adafactor
    assert [{name: value for name, value in g.items() if name != "params"} for g in one.param_groups] == groups
    train([one, other], [ours, theirs], steps=3, seed=3)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_state_close(one, ours, other, theirs, TOLERANCE[dtype])


def test_8_bit_state_comes_back_in_torchs_dtype_and_shapes(train):
    (params,) = parameters(torch.bfloat16, 1)
    optimizer = torch.optim.Adafactor(params)
    from_torch_(optimizer, state_dtype="int8")
    train([optimizer], [params], steps=3)
    to_torch_(optimizer)
    for p in params:
        assert set(optimizer.state[p]) == STATES[p.ndim] | {"step"}
        assert {optimizer.state[p][name].dtype for name in STATES[p.ndim]} == {torch.bfloat16}
    train([optimizer], [params], steps=3, seed=2)
    assert all(p.isfinite().all() for p in params)


def test_complex_parameters_are_left_to_torch_which_refuses_them_too():
    params = [torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)]
    message = r"Adafactor(params=...): every parameter must be real, not complex"
    assert why_not_convertible(torch.optim.Adafactor(params)) == message
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="complex"):
        torch.optim.Adafactor(params).step()
    for given in (params, [("weight", params[0])], [dict(params=params[0])]):
        with pytest.raises(RuntimeError, match=r"^Adafactor\(params=\.\.\.\): every parameter must be real"):
            Adafactor(given)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("row_var", (1, 4), r"'row_var' has shape \[1, 4\], its parameter \[3, 4\]; it must have \[3, 1\]"),
        ("col_var", (3, 4), r"'col_var' has shape \[3, 4\], its parameter \[3, 4\]; it must have \[1, 4\]"),
        ("variance", (3, 4), r"'variance' must not be there; its parameter of shape \[3, 4\] keeps none"),
    ],
)
def test_state_that_does_not_belong_is_refused_and_nothing_changes(name, shape, message, snapshot, train):
    (params,) = parameters(torch.float32, 1, [(3, 4), (5,)])
    optimizer = Adafactor(params)
    train([optimizer], [params], steps=2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0][name] = torch.ones(shape)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=rf"^Adafactor\.load_state_dict\(state_dict=\.\.\.\): of parameter 0, the state {message}\.$"
    ):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before


def test_state_of_another_shape_put_in_by_hand_is_refused(train):
    (params,) = parameters(torch.float32, 1, [(3, 4)])
    optimizer = Adafactor(params)
    train([optimizer], [params], steps=2)
    optimizer.state[params[0]]["row_var"] = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"^Adafactor\.step: the state 'row_var' has shape \[3, 4\], .* \[3, 4\]\.$"):
        optimizer.step()
