# SPDX-License-Identifier: Apache-2.0
"""Gradients that are all exactly 0, on numbers that are written down."""

import math
from dataclasses import replace

import pytest

from lightning_optkit.diagnostics._observations import Check, Losses, ParameterSeen, RunSeen
from lightning_optkit.diagnostics._signals import ActivationSeen, LossSeen
from lightning_optkit.diagnostics.rules import diagnose, is_exact
from lightning_optkit.diagnostics.rules.zero_gradients import zero_gradients

NAN = math.nan
PARAM = ParameterSeen("net.weight", "net", 100, False, True, False, 1.0, 0.0, 0.0, 0.0)
LOSS = LossSeen("mse_loss", None, 1, True, False, "(8,) and (8,)", 0.0, 0.0, 1.0, 0.5, 1.3, 1.0)


def seen(*, steps=32, num=6, planned=128, is_over=False, last=None, other=(), **parts):
    check = Check(0, 0.1, **{"parameters": (PARAM,), "losses": (LOSS,), "returned": 0.0, **parts})
    checks = [replace(check, step=step) for step in range(num)]
    checks[-1] = replace(checks[-1], **(last or {}))
    losses = Losses()
    for value in [*[check.returned] * (steps - len(other)), *other]:
        losses.append(value)
    return RunSeen(steps=steps, steps_planned=planned, losses=losses, checks=checks, is_over=is_over)


def test_a_loss_of_0_where_that_of_torch_is_another():
    verdict = zero_gradients(seen())
    assert (verdict.symptom, verdict.layer, verdict.onset_step) == ("no_gradient", None, 0)
    assert "multiplied by 0" in verdict.cause and "F.mse_loss gave 1.3" in verdict.evidence
    assert [each.symptom for each in diagnose(seen())] == ["no_gradient"]
    assert not is_exact(verdict)  # it stands as long as it is seen


@pytest.mark.parametrize(
    "parts",
    [
        dict(steps=19),
        dict(num=3),
        dict(last=dict(parameters=(replace(PARAM, has_gradient=True),))),
        dict(parameters=(replace(PARAM, is_optimized=False),)),
        dict(parameters=(PARAM, replace(PARAM, is_optimized=False, has_gradient=True))),
        dict(losses=(replace(LOSS, value=0.0),), is_over=True),  # all samples are right
        dict(losses=(replace(LOSS, value=0.04),), returned=0.04, is_over=True),
        dict(activations=(ActivationSeen("net", "relu", 0.6, 0.6, 256),), is_over=True),  # which has a rule of its own
        dict(losses=(), is_over=True),  # a hinge that is satisfied, say
        dict(losses=(), of_drawn_weights=1.0, is_over=True),
        dict(returned=1.3),  # too early
        dict(planned=132),  # a term that is weighted by 0 at first
        dict(other=[0.2]),  # labels in some batches
    ],
)
def test_it_is_silent(parts):
    assert zero_gradients(seen(**parts)) is None


def test_a_loss_of_0_that_is_0_of_drawn_weights_too():
    assert "a mask leaves nothing" in zero_gradients(seen(losses=(), of_drawn_weights=0.0)).cause


def test_a_flat_loss_is_said_when_the_run_is_judged():
    verdict = zero_gradients(seen(returned=1.3, is_over=True))
    assert "round" in verdict.cause and "at a loss of 1.3" in verdict.evidence
    assert "at a loss" not in zero_gradients(seen(returned=NAN, losses=(), is_over=True)).evidence
