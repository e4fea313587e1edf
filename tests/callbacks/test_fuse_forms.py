# SPDX-License-Identifier: Apache-2.0
"""Fuse takes whatever configure_optimizers returns: every form of it, tensors as rates, frozen parameters."""

import pytest
import torch
from fuse_cases import FORMS, OPTIMIZERS, Peek, Watcher, assert_close, assert_moments_close, configured

from lightning_optkit.callbacks import Fuse


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_form_of_configure_optimizers_sees_the_same_schedule(regression, fit, name, form):
    watchers, peek = (Watcher(), Watcher()), Peek()
    expected, module = (regression(lambda m: FORMS[form](configured(name)(m))) for _ in range(2))
    fit(expected, watchers[0])
    fit(module, Fuse(), watchers[1], peek)
    assert peek.are_one_pass == {True}
    assert watchers[1].lrs == watchers[0].lrs
    assert_close(module, expected)


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_module_without_an_optimizer_is_said_to_have_none(regression, fit, printed):
    class Manual(regression):
        def __init__(self):
            super().__init__(lambda module: None)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            pass

    fit(Manual(), Fuse(), accumulate_grad_batches=1)
    assert "Fuse: this module has no optimizer." in printed()


def test_a_tensor_lr(regression, fit):
    lrs = [torch.tensor(0.02), torch.tensor(0.02)]
    modules = [
        regression(lambda m, lr=lr: FORMS["dict with a scheduler"](torch.optim.AdamW(m.parameters(), lr=lr)))
        for lr in lrs
    ]
    fit(modules[0])
    fit(modules[1], Fuse())
    assert lrs[0] == lrs[1] != 0.02
    assert_close(modules[1], modules[0])


def test_frozen_parameters_stay_as_they_are(regression, fit):
    modules = [regression(configured("adamw")) for _ in range(2)]
    for module in modules:
        module.net[0].weight.requires_grad_(False)
    before = modules[1].net[0].weight.clone()
    fit(modules[0], gradient_clip_val=0.1)
    fit(modules[1], Fuse(), gradient_clip_val=0.1)
    assert torch.equal(modules[1].net[0].weight, before)
    assert_close(modules[1], modules[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_without_gradients_in_some_steps(regression, fit, name):
    class Skipping(regression):
        """The first layer is left out in epoch 0, and again in epoch 2."""

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 1)

    modules = [Skipping(configured(name)) for _ in range(2)]
    trainers = [fit(modules[0], gradient_clip_val=0.1), fit(modules[1], Fuse(), gradient_clip_val=0.1)]
    assert_close(modules[1], modules[0])
    assert_moments_close(trainers[1], trainers[0])
