# SPDX-License-Identifier: Apache-2.0
"""The average of any optimizer, against torch's AveragedModel and against the one folded into a one-pass step."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_optkit.averaging import EMA, LAWA, SWA, own_pass, standalone
from lightning_optkit.averaging.standalone import (
    averages_of,
    late_averages,
    protect_average,
    read_average,
    update_average_,
)
from lightning_optkit.optimizers import SGD, Adam, AdamW

OPTIMIZERS = {
    "sgd": (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    "plain sgd": (SGD, torch.optim.SGD, dict(lr=0.1)),
    "adam": (Adam, torch.optim.Adam, dict(lr=0.1)),
    "adamw": (AdamW, torch.optim.AdamW, dict(lr=0.1)),
}
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # ten steps of size 0.1, rounded by 6e-8 and divided by small roots
}
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Mean:
    """Every update weighs the same: AverageKind::kUniform."""

    state_name: str = "mean"
    kind: int = 2
    decay: float = 0.0
    start: int = 1
    every: int = 1


def model(dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)).to(dtype)


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def averages(optimizer, params, name="ema"):
    return [optimizer.state[p][name] for p in params]


@pytest.mark.parametrize(
    "average, torchs",
    [(EMA(0.9), dict(multi_avg_fn=get_ema_multi_avg_fn(0.9))), (Mean(), {})],
    ids=["exponential", "uniform"],
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_averaged_model_of_torch(dtype, average, torchs):
    net = model(dtype)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.1)
    averaged = AveragedModel(net, **torchs)
    for step in range(1, 11):
        give_gradients(params, step)
        optimizer.step()
        update_average_(optimizer, average, step)
        averaged.update_parameters(net)
        expected = [p.detach() for p in averaged.module.parameters()]
        actual = averages(optimizer, params, average.state_name)
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])
    assert all(state["num_averaged"] == averaged.n_averaged for state in optimizer.state.values())


@pytest.mark.parametrize("average", [EMA(0.9), EMA(0.5, start=4), EMA(0.5, start=2, every=3), EMA(0.0)], ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, *SIXTEEN_BIT], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_average_folded_into_the_step(name, dtype, average):
    ours_class, _torch_class, kwargs = OPTIMIZERS[name]
    ours, theirs = list(model(dtype).parameters()), list(model(dtype).parameters())
    folded, own = ours_class(ours, **kwargs, average=average), _torch_class(theirs, **kwargs)
    for step in range(1, 11):
        for params, optimizer in ((ours, folded), (theirs, own)):
            give_gradients(params, step)
            optimizer.step()
        if dtype in SIXTEEN_BIT:  # the two keep their moments in different precisions; only the averages count here
            for p, q in zip(ours, theirs, strict=True):
                q.data.copy_(p.detach())
        update_average_(own, average, step)
        if step < average.start:
            assert not any("ema" in state for state in own.state.values())
        else:
            expected, actual = averages(folded, ours), averages(own, theirs)
            torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE.get(dtype, 1e-6))
            assert [a.dtype for a in actual] == [e.dtype for e in expected]
            assert [own.state[p]["num_averaged"] for p in theirs] == [folded.state[p]["num_averaged"] for p in ours]


@pytest.mark.parametrize("average", [EMA(0.5), EMA(0.5, start=3), EMA(0.5, every=2)], ids=str)
@pytest.mark.parametrize("steps_without", [{2, 4, 6}, {4, 5}, {1}, {1, 2, 3, 5}], ids=str)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_parameter_whose_gradient_comes_and_goes_is_averaged_as_in_the_folded_pass(name, steps_without, average):
    """All averages keep one clock; a parameter that joins later starts as a copy."""
    ours_class, _torch_class, kwargs = OPTIMIZERS[name]
    ours, theirs = list(model().parameters()), list(model().parameters())
    folded, own = ours_class(ours, **kwargs, average=average), _torch_class(theirs, **kwargs)
    for step in range(1, 8):
        for params, optimizer in ((ours, folded), (theirs, own)):
            give_gradients(params, step)
            if step in steps_without:
                params[0].grad = None
            late = late_averages(optimizer, average) if optimizer is own else {}
            optimizer.step()
            for param, state in late.items():
                optimizer.state[param].update(state)
        update_average_(own, average, step)
    torch.testing.assert_close(averages(own, theirs), averages(folded, ours), rtol=0, atol=1e-12)


LATE = {
    "exponential": (EMA(0.8), dict(multi_avg_fn=get_ema_multi_avg_fn(0.8))),
    "uniform": (SWA(start=1), {}),
}


@pytest.mark.parametrize("joins", ["first gradient", "new group", "gradient that pauses"])
@pytest.mark.parametrize("is_folded", [True, False], ids=["folded", "own pass"])
@pytest.mark.parametrize("kind", LATE)
def test_a_parameter_that_stood_still_at_first_is_averaged_as_by_the_averaged_model(kind, is_folded, joins):
    """A frozen parameter is averaged with itself."""
    average, torchs = LATE[kind]
    net = model()
    params = list(net.parameters())
    early = params[2:] if joins == "new group" else params
    cls, kwargs = (AdamW, dict(average=average)) if is_folded else (torch.optim.AdamW, {})
    optimizer, averaged = cls(early, lr=0.1, **kwargs), AveragedModel(net, **torchs)
    for step in range(1, 9):
        if step == 5 and joins == "new group":
            optimizer.add_param_group(dict(params=params[:2]))
        give_gradients(params, step)
        if step < 5 or (joins == "gradient that pauses" and step == 6):
            params[0].grad = params[1].grad = None
        late = {} if is_folded else late_averages(optimizer, average)
        assert is_folded or len(late) == 2 * (step == 5)
        optimizer.step()
        for param, state in late.items():
            optimizer.state[param].update(state)
        if not is_folded:
            update_average_(optimizer, average, step)
        averaged.update_parameters(net)
        assert is_folded or step >= 5 or not optimizer.state.get(params[0]), "no memory before it moves"
    expected = [p.detach() for p in averaged.module.parameters()]
    torch.testing.assert_close(averages(optimizer, params, average.state_name), expected, rtol=0, atol=1e-12)
    assert {float(optimizer.state[p]["num_averaged"]) for p in params} == {8.0}


@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize("is_folded", [True, False], ids=["folded", "own pass"])
def test_a_parameter_without_a_gradient_when_averages_begin_is_averaged_from_there(is_folded, start):
    average, params = SWA(start=start), list(model().parameters())
    cls, kwargs = (SGD, dict(average=average)) if is_folded else (torch.optim.SGD, {})
    optimizer, seen = cls(params, lr=0.1, **kwargs), []
    for step in range(1, 6):
        give_gradients(params, step)
        if step in (2, 3):
            params[0].grad = None
        late = {} if is_folded else late_averages(optimizer, average)
        optimizer.step()
        for param, state in late.items():
            optimizer.state[param].update(state)
        if not is_folded:
            update_average_(optimizer, average, step)
        seen += [params[0].detach().clone()] if step >= start else []
    torch.testing.assert_close(optimizer.state[params[0]]["swa"], torch.stack(seen).mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_snapshots_of_a_parameter_that_stood_still_are_its_value(taken):
    average = LAWA(k=3)
    body, head = (torch.full((2,), 4.0, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([body, head], lr=1.0)
    head.grad = torch.ones(2)
    for step in range(1, taken + 1):
        update_average_(optimizer, average, step)
    body.grad = torch.ones(2)
    late = late_averages(optimizer, average)
    optimizer.step()
    optimizer.state[body].update(late[body])
    update_average_(optimizer, average, taken + 1)
    num = min(taken + 1, 3)
    expected = torch.full((2,), 4.0 - 1 / num)  # one snapshot of 3 among those of 4
    torch.testing.assert_close(read_average(optimizer.state[body], average), expected, rtol=0, atol=1e-6)


def test_the_first_update_copies():
    p = torch.tensor([3.0, -1.0], requires_grad=True)
    p.grad = torch.zeros(2)
    optimizer = torch.optim.SGD([p], lr=0.1)
    update_average_(optimizer, EMA(0.9, start=5), step=5)
    assert torch.equal(optimizer.state[p]["ema"], p)
    assert optimizer.state[p]["ema"].data_ptr() != p.data_ptr()
    assert not optimizer.state[p]["ema"].requires_grad


def test_a_parameter_that_is_never_updated_has_no_average():
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    p.grad = torch.ones(2)
    optimizer = torch.optim.SGD([p, q], lr=0.1)
    update_average_(optimizer, EMA(0.9), step=1)
    assert "ema" in optimizer.state[p]
    assert not optimizer.state.get(q)


def test_leaves_parameters_and_gradients_alone(frozen):
    params = list(model().parameters())
    give_gradients(params, 0)
    optimizer = torch.optim.SGD(params, lr=0.1)
    before = frozen([*params, *(p.grad for p in params)])
    for step in (1, 2, 3):
        update_average_(optimizer, EMA(0.9), step)
    assert frozen([*params, *(p.grad for p in params)]) == before


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_any_layout(layout):
    p = torch.arange(24.0).view(1, 2, 3, 4)
    p = p.to(memory_format=torch.channels_last) if layout == "channels_last" else p.transpose(1, 3)
    p = p.clone(memory_format=torch.preserve_format).requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD([p], lr=1.0)
    expected = p.detach().clone()
    update_average_(optimizer, EMA(0.5), step=1)
    optimizer.step()
    update_average_(optimizer, EMA(0.5), step=2)
    torch.testing.assert_close(optimizer.state[p]["ema"], expected - 0.5, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_state_goes_through_the_optimizers_state_dict(dtype):
    """torch's own load_state_dict would cast the average to the parameters' dtype."""
    params, again = list(model(dtype).parameters()), list(model(dtype).parameters())
    optimizer, resumed = torch.optim.AdamW(params), torch.optim.AdamW(again)
    handles = protect_average(resumed, EMA(0.9))
    give_gradients(params, 0)
    optimizer.step()
    update_average_(optimizer, EMA(0.9), step=1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, again, strict=True):
        q.data.copy_(p.detach())
    for optimizer_, params_ in ((optimizer, params), (resumed, again)):
        give_gradients(params_, 1)
        optimizer_.step()
        update_average_(optimizer_, EMA(0.9), step=2)
    torch.testing.assert_close(averages(resumed, again), averages(optimizer, params), rtol=0, atol=0)
    for handle in handles:
        handle.remove()
    resumed.load_state_dict(optimizer.state_dict())
    assert averages(resumed, again)[0].dtype == dtype


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, AdamW], ids=["torch", "ours"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ema", torch.ones(3)),
        ("ema", None),
        ("ema", 1.0),
        ("ema", torch.ones(2).to_sparse()),
        ("ema", torch.ones(2, device="meta")),
        ("num_averaged", "x"),
        ("num_averaged", -1.0),
        ("num_averaged", torch.ones(2)),
    ],
    ids=str,
)
def test_an_average_that_cannot_be_one_is_refused_and_nothing_changes(name, value, optimizer_class, snapshot):
    def kept(size):
        p = torch.full((2,), size, requires_grad=True)
        optimizer = optimizer_class([p], lr=0.1 * size)
        handles = protect_average(optimizer, EMA(0.9))
        p.grad = torch.ones(2)
        optimizer.step()
        update_average_(optimizer, EMA(0.9), step=1)
        return optimizer, p, handles

    source, resumed = kept(2.0)[0], kept(1.0)[0]
    saved, before = copy.deepcopy(source.state_dict()), snapshot(resumed)
    saved["state"][0][name] = value
    message = rf"load_state_dict\(state_dict=\.\.\.\): of parameter 0, the state '{name}' "
    with pytest.raises((TypeError, ValueError), match=message):
        resumed.load_state_dict(saved)
    assert snapshot(resumed) == before
    resumed.load_state_dict({**saved, "state": {}})  # what was refused does not come later
    assert not resumed.state


@pytest.mark.parametrize("given", [{}, {"state": {}}, {"param_groups": None, "state": {}}], ids=str)
def test_what_is_no_state_dict_is_left_to_the_optimizer_to_refuse(given):
    optimizer = AdamW([torch.ones(2, requires_grad=True)])
    protect_average(optimizer, EMA(0.9))
    with pytest.raises((TypeError, ValueError), match=r"^AdamW\.load_state_dict\(state_dict=\.\.\.\): "):
        optimizer.load_state_dict(given)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": AdamW}, r"optimizer=AdamW\): optimizer must be one"),
        ({"average": EMA}, r"average=EMA\): average must be an average such as EMA\(0\.999\)"),
        ({"name": 3}, r"name=3\): name must be None or the name"),
    ],
)
@pytest.mark.parametrize("function", [averages_of, protect_average, partial(update_average_, step=1)])
def test_wrong_arguments_are_refused(function, wrong, message):
    right = {"optimizer": AdamW([torch.ones(2, requires_grad=True)]), "average": EMA(0.9)}
    with pytest.raises(TypeError, match=rf"^(averages_of|protect_average|update_average_)\({message}"):
        function(**{**right, **wrong})
    with pytest.raises(ValueError, match=r"^update_average_\(step=-1\)"):
        update_average_(**right, step=-1)


def test_the_other_import_path_gives_the_same_functions():
    assert [getattr(own_pass, name) for name in own_pass.__all__] == [getattr(standalone, n) for n in own_pass.__all__]
