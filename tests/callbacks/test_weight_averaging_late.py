# SPDX-License-Identifier: Apache-2.0
"""Layers that begin to train later than others are averaged as by torch's AveragedModel, which never waits."""

import pytest
import torch
from average_cases import PATHS, assert_equal, fuse, resuming
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import WeightAveraging

EPOCH, TOLERANCE = 2, 1e-6  # the epoch in which the first layer begins
RUN = dict(epochs=4, limit_val_batches=0)
AVERAGES = {
    "EMA": (lambda: EMA(0.8), get_ema_multi_avg_fn(0.8)),
    "SWA": (lambda: SWA(1), get_swa_multi_avg_fn()),
    "LAWA": (lambda: LAWA(k=100), get_swa_multi_avg_fn()),
}


class Expected(Callback):
    """An AveragedModel of the module, updated by every step."""

    def __init__(self, function):
        self.function = function

    def on_train_start(self, trainer, pl_module):
        self.averaged = AveragedModel(pl_module.net, multi_avg_fn=self.function)
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.averaged.update_parameters(pl_module.net)

    def weights(self):
        return {name: p.detach() for name, p in self.averaged.module.named_parameters()}


class Unfreeze(Callback):
    """The first layer trains from EPOCH on."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch >= EPOCH)


class AddGroup(Callback):
    """The first layer joins the optimizer at EPOCH, as by BackboneFinetuning."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == EPOCH:
            trainer.optimizers[0].add_param_group(dict(params=list(pl_module.net[0].parameters())))


class Replace(Callback):
    """The first layer joins with an optimizer that takes the place of the one before."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == EPOCH:
            kind = type(trainer.optimizers[0])
            trainer.optimizers = [kind(pl_module.parameters(), lr=0.05)]


def of_all(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def of_the_last(module):
    return torch.optim.AdamW(module.net[2].parameters(), lr=0.05)


def lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.05, max_iter=3)


EVENTS = {
    "unfrozen": (of_all, Unfreeze),
    "new group": (of_the_last, AddGroup),
    "new optimizer": (of_the_last, Replace),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("name", AVERAGES)
def test_a_layer_that_begins_later_is_averaged_with_itself(regression, fit, name, event, path):
    (make, function), (configure, late) = AVERAGES[name], EVENTS[event]
    module, expected = regression(configure), Expected(function)
    fit(module, late(), *fuse(path), WeightAveraging(make()), expected, **RUN)
    assert_equal({n: p.detach() for n, p in module.net.named_parameters()}, expected.weights(), TOLERANCE)


class Pause(Callback):
    """The first layer is frozen in epoch 1, in which another optimizer takes over, and trains again from EPOCH on."""

    def __init__(self, make):
        self.make = make

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch != 1)
        if trainer.current_epoch == 1:
            trainer.optimizers = [self.make(pl_module)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.SGD])
@pytest.mark.parametrize("name", ["EMA", "SWA"])
def test_an_idle_layer_of_a_replaced_optimizer_keeps_its_average(regression, fit, name, kind, path):
    make, function = AVERAGES[name]
    module, expected = regression(of_all), Expected(function)
    late = Pause(lambda module: kind(module.parameters(), lr=0.01))
    fit(module, late, *fuse(path), WeightAveraging(make()), expected, **RUN)
    assert_equal({n: p.detach() for n, p in module.net.named_parameters()}, expected.weights(), TOLERANCE)


def test_a_second_average_beside_a_folded_one(regression, fit):
    module, expected = regression(of_all), Expected(get_ema_multi_avg_fn(0.8))
    first, second = WeightAveraging(EMA(0.5), evaluate=False), WeightAveraging(EMA(0.8))
    fit(module, Unfreeze(), *fuse("folded"), first, second, expected, **RUN)
    assert_equal({n: p.detach() for n, p in module.net.named_parameters()}, expected.weights(), TOLERANCE)


def test_under_an_optimizer_that_moves_the_weights_between_evaluations(regression, fit):
    module, expected = regression(lbfgs), Expected(get_swa_multi_avg_fn())
    fit(module, Unfreeze(), WeightAveraging(SWA(1)), expected, accumulate_grad_batches=1, **RUN)
    assert_equal({n: p.detach() for n, p in module.net.named_parameters()}, expected.weights(), TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_a_layer_whose_first_step_is_skipped_begins_with_the_next(regression, fit, path):
    module = regression(of_all, poisoned={(EPOCH, 0), (EPOCH, 1)})
    expected = Expected(get_swa_multi_avg_fn())
    averaging = WeightAveraging(SWA(1))
    trainer = fit(module, Unfreeze(), *fuse(path), averaging, expected, precision="16-mixed", **RUN)
    counts = {int(state["num_averaged"]) for state in trainer.optimizers[0].state.values()}
    assert counts == {7}, "eight steps, one of them skipped"


@pytest.mark.parametrize("path", PATHS)
@resuming
def test_a_checkpoint_from_before_goes_on_alike(regression, fit, tmp_path, path):
    def module_and_callbacks():
        return regression(of_all), [Unfreeze(), *fuse(path), WeightAveraging(EMA(0.8))]

    module, callbacks = module_and_callbacks()
    fit(module, *callbacks, **RUN)
    first, callbacks = module_and_callbacks()
    trainer = fit(first, *callbacks, **{**RUN, "epochs": EPOCH})
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    resumed, callbacks = module_and_callbacks()
    fit(resumed, *callbacks, ckpt_path=tmp_path / "early.ckpt", **RUN)
    assert_equal(dict(resumed.named_parameters()), dict(module.named_parameters()))
