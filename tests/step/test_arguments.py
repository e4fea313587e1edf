# SPDX-License-Identifier: Apache-2.0
"""Bad arguments: one sentence that names the argument, its value and what is allowed; and nothing changes."""

import pytest
import torch

from lightning_optkit.optimizers import AdamW


def ones(*shape):
    return torch.ones(*shape, requires_grad=True)


class Elsewhere(torch.nn.Parameter):
    """A parameter that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda:0")


TWICE = ones(2)
BAD_ARGUMENTS = {
    "negative lr": (dict(params=[ones(2)], lr=-0.1), ValueError, r"AdamW\(lr=-0\.1\): lr must be in \[0, inf\)\."),
    "lr of two elements": (dict(params=[ones(2)], lr=torch.ones(2)), ValueError, r"AdamW\(lr=\[2\] tensor\)"),
    "unknown rounding": (
        dict(params=[ones(2)], rounding="up"),
        ValueError,
        r"AdamW\(rounding='up'\): rounding must be one of 'nearest', 'stochastic', 'kahan', 'split24', 'split32'\.",
    ),
    "rounding of a group": (dict(params=[dict(params=[ones(2)], rounding="up")]), ValueError, r"rounding='up'"),
    "state dtype": (
        dict(params=[ones(2)], state_dtype=torch.float16),
        ValueError,
        r"AdamW\(state_dtype=torch\.float16\)",
    ),
    "negative l1": (dict(params=[ones(2)], l1=-1.0), ValueError, r"AdamW\(l1=-1\.0\): l1 must be in \[0, inf\)\."),
    "cautious is no bool": (dict(params=[ones(2)], cautious="yes"), ValueError, r"AdamW\(cautious='yes'\)"),
    "clip is a number": (dict(params=[ones(2)], clip=1.0), (TypeError, ValueError), r"AdamW\(clip=1\.0\)"),
    "average is a number": (dict(params=[ones(2)], average=0.9), (TypeError, ValueError), r"AdamW\(average=0\.9\)"),
    "statistics is no bool": (
        dict(params=[ones(2)], statistics="yes"),
        (TypeError, ValueError),
        r"AdamW\(statistics='yes'\)",
    ),
    "differentiable": (dict(params=[ones(2)], differentiable=True), ValueError, r"AdamW\(differentiable=True\)"),
    "fused and foreach": (dict(params=[ones(2)], fused=True, foreach=True), RuntimeError, "at most one"),
    "no parameters": (dict(params=[]), ValueError, r"AdamW\(params=\[\]\): params must hold at least one parameter\."),
    "no parameters in a generator": (dict(params=(p for p in ())), ValueError, "at least one parameter"),
    "a bare tensor": (dict(params=ones(2)), TypeError, "must be an iterable"),
    "twice in a group": (dict(params=[TWICE, TWICE]), ValueError, "a parameter is given twice"),
    "twice across groups": (
        dict(params=[dict(params=[TWICE]), dict(params=[TWICE])]),
        ValueError,
        "a parameter is given twice",
    ),
    "two devices": (
        dict(params=[ones(2), Elsewhere(torch.ones(2))]),
        ValueError,
        r"all parameters must be on one device, got \['cpu', 'cuda:0'\]",
    ),
    "no leaf": (dict(params=[ones(2) * 2]), ValueError, "non-leaf"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_refuses_bad_arguments_in_one_sentence(case):
    kwargs, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message) as raised:
        AdamW(**kwargs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "group",
    [
        dict(params=[TWICE]),
        dict(params=[Elsewhere(torch.ones(2))]),
        dict(params=[ones(2)], lr=-1.0),
        dict(params=[ones(2)], betas=(0.9, 1.0)),
        dict(params=[ones(2)], rounding="up"),
        dict(params=[ones(2) * 2]),
    ],
    ids=["known parameter", "other device", "negative lr", "bad beta", "unknown rounding", "no leaf"],
)
def test_a_group_that_does_not_fit_is_refused_and_nothing_changes(group, snapshot):
    optimizer = AdamW([TWICE])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"AdamW\(|non-leaf"):
        optimizer.add_param_group(group)
    assert snapshot(optimizer) == before
    assert len(optimizer.param_groups) == 1
