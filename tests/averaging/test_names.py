# SPDX-License-Identifier: Apache-2.0
"""No average takes a name under which the optimizer, or another average, keeps a tensor."""

import inspect
from contextlib import suppress

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA, LAWA, SWA, averages_of, protect_average, update_average_
from lightning_optkit.averaging._names import OF_OPTIMIZERS

FUNCTIONS = {
    "update_average_": lambda optimizer, average, name: update_average_(optimizer, average, 1, name=name),
    "averages_of": averages_of,
    "protect_average": protect_average,
}


def trained(cls, steps=1, dtype=torch.float32, **arguments):
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
    optimizer = cls([weight], lr=0.1, **arguments)
    getattr(optimizer, "train", bool)()  # of a schedule-free one
    weight.grad = torch.ones_like(weight)
    for _ in range(steps):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("cls", [torch.optim.AdamW, optimizers.AdamW])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ["exp_avg", "step"])
def test_a_state_of_the_optimizer_is_no_average(function, cls, steps, name, snapshot):
    optimizer = trained(cls, steps)
    before = snapshot(optimizer)
    said = rf"^{function}\(name='{name}'\): '{name}' names something else .*, such as '{name}_2'\.$"
    with pytest.raises(ValueError, match=said):
        FUNCTIONS[function](optimizer, EMA(0.9), name)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("function", FUNCTIONS)
def test_another_average_is_not_taken_for_this_one(function):
    optimizer = trained(torch.optim.Rprop)
    update_average_(optimizer, EMA(0.9), 1)
    with pytest.raises(ValueError, match=rf"^{function}\(name='ema'\): 'ema' names something else"):
        FUNCTIONS[function](optimizer, SWA(start=1), "ema")
    FUNCTIONS[function](optimizer, EMA(0.9), None)
    FUNCTIONS[function](optimizer, SWA(start=1), "ema_2")
    FUNCTIONS[function](optimizer, LAWA(k=2), "lawa_2")


def test_a_foreign_state_of_the_default_name_is_not_taken():
    optimizer = trained(torch.optim.Rprop)
    (state,) = optimizer.state.values()
    state["ema"] = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"^update_average_\(name=None\): 'ema' names something else"):
        update_average_(optimizer, EMA(0.9), 1)


def test_the_names_are_those_of_every_optimizer():
    found = set()
    for cls in [*vars(torch.optim).values(), *vars(optimizers).values()]:
        if not inspect.isclass(cls) or not issubclass(cls, torch.optim.Optimizer):
            continue
        for more in ({}, {"amsgrad": True}, {"momentum": 0.9, "centered": True}, {"momentum": 0.9}):
            with suppress(TypeError, RuntimeError, ValueError):  # arguments of others; LBFGS; SparseAdam
                found |= {name for state in trained(cls, **more).state.values() for name in state}
    for rounding in ("kahan", "split24", "split32"):
        states = trained(optimizers.SGD, dtype=torch.bfloat16, rounding=rounding).state.values()
        found |= {name for state in states for name in state}
    assert len(found) > 30 and found <= OF_OPTIMIZERS
