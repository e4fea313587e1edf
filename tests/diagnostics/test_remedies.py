# SPDX-License-Identifier: Apache-2.0
"""A small sample of `python -m tests.diagnostics.benchmark.remedies`, and how a remedy is pasted."""

import pytest
import torch
from torch import nn

import lightning_optkit as ok
from tests.diagnostics.benchmark import families, remedies
from tests.diagnostics.benchmark.faults_of_learning import LEARNING

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("fault", ["dead_bias"])
def test_what_is_pasted_cures(fault):
    row = remedies.run(1, False, [each for each in LEARNING if each.name == fault])
    assert row["is_named"] and row["pasted"] and row["cured"], row


def test_a_callback_is_pasted_in_place_of_one_of_its_kind():
    setup = families.build(families.mlp, 0)
    setup.callbacks = [ok.WeightAveraging(ok.EMA(0.999)), ok.Initialize(ok.init.he)]
    pasted = remedies.paste(setup, "ok.WeightAveraging(ok.EMA(decay=0.9)), or none")
    assert pasted == "ok.WeightAveraging(ok.EMA(decay=0.9))"
    kinds = [type(each).__name__ for each in setup.callbacks]
    assert kinds == ["Initialize", "WeightAveraging"] and setup.callbacks[1].average.decay == 0.9


def test_a_statement_changes_the_program():
    setup = families.build(families.mlp, 0)
    nn.init.ones_(setup.body[0].bias)
    remedies.paste(setup, 'torch.nn.init.zeros_(self.get_parameter("body.0.bias")), or ok.Initialize(ok.init.he)')
    assert torch.equal(setup.body[0].bias, torch.zeros(64))


def test_a_rate_is_that_of_the_optimizer_whatever_the_fault_had_made_of_it():
    for seed, factor in ((0, 1.0), (5, 4.0)):  # plain SGD takes four times the rate of its setup
        setup = families.build(families.mlp, seed)
        setup.lr_factor = 100.0
        assert remedies.paste(setup, "lr=0.002, or a warm-up") == "lr=0.002"
        assert factor * setup.lr == pytest.approx(0.002)


def test_an_edit_of_the_users_code_and_a_look_at_the_data_are_not_pasted():
    setup = families.build(families.mlp, 0)
    for remedy in ("leave softmax out: the loss contains it", "look at next(iter(loader))"):
        assert remedies.paste(setup, remedy) is None


def test_training_mode_comes_before_every_batch_or_once_as_the_remedy_says():
    for remedy, callbacks in (("on_train_batch_start; something calls eval()", 1), ("on_train_start; a model", 0)):
        setup = families.build(families.mlp, 0)
        assert remedies.paste(setup, f"self.train() in {remedy}") == "self.train()"
        assert len(setup.callbacks) == callbacks and (setup.at_start is None) == bool(callbacks)
