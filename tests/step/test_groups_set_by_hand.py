# SPDX-License-Identifier: Apache-2.0
"""Groups, parameters and stages set by hand are those of the next step, or refused."""

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipUnitwise
from lightning_optkit.optimizers import SGD, AdamW
from tests.step.moved_cases import steps


def by_list(optimizer, new):
    optimizer.param_groups[0]["params"] = [new]


def by_tuple(optimizer, new):
    optimizer.param_groups[0]["params"] = (new,)


def by_tensor(optimizer, new):
    optimizer.param_groups[0]["params"] = new


def by_group(optimizer, new):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [new]}


def by_groups(optimizer, new):
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [new]}]


def by_item(optimizer, new):
    optimizer.param_groups[0]["params"][0] = new


def by_slice(optimizer, new):
    optimizer.param_groups[0]["params"][:] = [new]


def by_one_more_group(optimizer, new):
    optimizer.param_groups[0]["params"].clear()
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [new]})


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    "how",
    [by_list, by_tuple, by_tensor, by_group, by_groups, by_item, by_slice, by_one_more_group],
    ids=lambda f: f.__name__,
)
def test_groups_set_by_hand_are_those_that_are_stepped(how, fused):
    old, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([old], lr=0.1, fused=fused)
    steps(optimizer, [old], range(1))
    how(optimizer, new)
    before = old.detach().clone()
    old.grad, new.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(old.detach(), before)
    torch.testing.assert_close(new.detach(), torch.full((3,), 0.899))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda p: [p, p], ValueError, "given twice"),
        (lambda p: [p, None], TypeError, "must hold tensors, not a NoneType"),
        (lambda p: ["weight"], TypeError, "must hold tensors, not a str"),
    ],
)
def test_groups_set_by_hand_to_what_no_group_can_hold_are_refused(params, error, message):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p])
    steps(optimizer, [p], range(1))
    optimizer.param_groups[0]["params"] = params(p)
    with pytest.raises(error, match=rf"^SGD\.step.*{message}"):
        optimizer.step()


@pytest.mark.parametrize("change", [dict(centralize=True), "clip", "average"], ids=str)
def test_a_stage_set_by_hand_is_there_in_the_next_step(change):
    def run(fused):
        # Its first dimension is not outermost in memory: the compiled walk cannot treat its rows by themselves.
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
        optimizer = SGD([p], lr=0.1, fused=fused)
        steps(optimizer, [p], range(1))
        if change == "clip":
            optimizer.clip = ClipUnitwise(0.01)
        elif change == "average":
            optimizer.keep_average(EMA(0.5))
        else:
            optimizer.param_groups[0].update(change)
        steps(optimizer, [p], range(1, 3))
        return [p.detach(), optimizer.state[p].get("ema", torch.zeros(()))]

    torch.testing.assert_close(run(None), run(False))
