# SPDX-License-Identifier: Apache-2.0
"""The rate that the first step tells, on numbers that are written down and in real runs."""

import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest

import lightning_optkit as ok
from lightning_optkit.diagnostics._observations import Check, Losses, ParameterSeen, RunSeen
from lightning_optkit.diagnostics._signals import LayerSeen
from lightning_optkit.diagnostics.rules.lower_rate import likely_rate
from lightning_optkit.diagnostics.rules.rates import lr_too_high
from tests.diagnostics.benchmark import families, high_rates, runs

ROWS = 16
LAYERS = tuple(LayerSeen(f"net.{i}", 1.0, 1.0, 1e-3, gain=1.0, rows=ROWS) for i in range(3))  # weights of norm 4


def seen(*, update, grad, rate=10.0, loss=2.3, layers=LAYERS, **parts):
    """A run whose first step was of this size; two others follow, at whatever size."""
    params = tuple(ParameterSeen(f"{each.name}.weight", each.name, 64, False, True, True, 1e3, grad, update, 0.0)
                   for each in LAYERS)  # fmt: skip
    first = Check(0, rate, parameters=params, layers=layers, **parts)
    lost = replace(first, step=1, parameters=tuple(replace(p, update_norm=1e9, grad_norm=1e9) for p in params))
    losses = Losses()
    losses.append(loss)
    return RunSeen(steps=3, losses=losses, checks=[first, lost, replace(lost, step=2)])


def test_of_a_rule_like_adams_the_first_step_would_change_the_median_matrix_by_3_percent():
    run = seen(update=80.0, grad=0.1)  # 20 times the norm of the weights, at a rate of 10
    assert likely_rate(run) == pytest.approx(10 * 0.03 / 20)
    assert likely_rate(seen(update=800.0, grad=0.1, rate=100.0)) == pytest.approx(likely_rate(run))


def test_of_steps_along_the_gradient_by_2_percent_less_what_momentum_adds_or_by_a_tenth_of_the_loss():
    plain = dict(update=4.0, grad=0.4)  # the rate times the gradient: as much as the weights
    assert likely_rate(seen(**plain)) == pytest.approx(10 * 0.02 / 1.0)
    assert likely_rate(seen(**plain, momentum=0.9)) == pytest.approx(10 * 0.02 / 1.0 / 10**0.5)
    steep = seen(**plain, loss=0.48)  # the square of the gradient of three matrices is 0.48
    assert likely_rate(steep) == pytest.approx(0.1)
    assert likely_rate(seen(**plain, loss=math.nan)) == likely_rate(seen(**plain, loss=-1.0)) == pytest.approx(0.2)


def test_what_is_not_known():
    known = dict(update=80.0, grad=0.1)
    for parts in (
        dict(layers=()),
        dict(layers=tuple(replace(each, rows=0) for each in LAYERS)),
        dict(layers=tuple(replace(each, gain=0.01) for each in LAYERS)),  # heads of zeros
        dict(rate=0.0),
        dict(rate=math.nan),
        dict(update=math.nan),
    ):
        assert math.isnan(likely_rate(seen(**{**known, **parts})))
    run = seen(**known)
    assert math.isnan(likely_rate(replace(run, checks=run.checks[1:]))) and math.isnan(likely_rate(RunSeen()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("optimizer", high_rates.OPTIMIZERS)
def test_a_rate_of_100_is_cured_in_a_real_run(optimizer):
    (row,) = high_rates.planned([families.mlp], 1, optimizers=[optimizer], rates=[100.0])
    assert row["primary"] == "lr_too_high" and row["cured"], row
    assert row["remedy"].startswith("lr=") and "or ok.LRFinder()" in row["remedy"]


@pytest.mark.filterwarnings("ignore")
def test_the_norm_of_the_weights_is_that_before_the_step():
    setup = families.build(families.cnn, 0)
    setup.optimizer, setup.lrs, setup.lr_factor = "adamw", (5.0, 5.0), 1.0
    norms = {name: float(p.detach().norm()) for name, p in setup.body.named_parameters() if name.endswith("weight")}
    kept = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            kept.extend(health._seen.checks[:1] if not kept else [])

    health = ok.GradientHealth(verbose=False)
    setup.trainer["max_steps"] = 1
    runs.train(setup, health, Look())
    (check,) = kept
    assert {f"body.{name}": norm for name, norm in norms.items()} == pytest.approx(
        {f"{layer.name}.weight": layer.weight_norm for layer in check.layers if layer.name.startswith("body")}, rel=1e-4
    )
    assert lr_too_high(RunSeen(checks=[check])) is None
