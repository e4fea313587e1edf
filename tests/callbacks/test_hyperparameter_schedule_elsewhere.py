# SPDX-License-Identifier: Apache-2.0
"""HyperparameterSchedule of what is not in the groups: dropout, clips, the l1 of ElasticNet, decays of averages."""

import lightning.pytorch as pl
import pytest
import torch
from hyperparameter_schedule_cases import RUN, adamw, expected, scheduled, sgd, with_dropouts
from torch import nn

from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.callbacks import (
    ElasticNet,
    Fuse,
    GradientClipping,
    HyperparameterSchedule,
    ParameterGroups,
    WeightAveraging,
)
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipValue
from lightning_optkit.layers import AddLayerNorm, AddRMSNorm, DropBlock2d, DropConnect, DropPath, LockedDropout
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import constant, linear, piecewise_constant

pytestmark = pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop")

regularized = pytest.fixture(with_dropouts)


class Dropouts(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(pl_module.net.rates())


def test_dropout_is_that_of_every_module(fit, regularized):
    watch, bases = Dropouts(), [0.4, 0.2, 0.1, 0.0, 0.3]
    fit(regularized, scheduled("dropout", linear(0.0, 0.6)), watch)
    for batch, rates in enumerate(watch.seen):
        assert rates == pytest.approx([base * 0.6 * (batch // 2) / RUN for base in bases])
    assert regularized.net.rates() == bases


def test_dropout_with_one_base(fit, regularized):
    watch = Dropouts()
    fit(regularized, scheduled("dropout", constant(0.5), base=0.3), watch)
    assert watch.seen[0] == pytest.approx([0.15, 0.15, 0.15, 0.0, 0.15])


def test_dropout_of_this_package_is_scheduled_alike(fit, regression):
    layers = [DropPath(0.2), DropBlock2d(0.3, 1), LockedDropout(0.4), DropConnect(nn.Linear(2, 2), p=0.5)]
    sums = [AddLayerNorm(2, dropout=0.6), AddRMSNorm(2, dropout=0.7), AddLayerNorm(2)]
    module, seen = regression(sgd), []
    module.extra = nn.ModuleList([*layers, *sums])

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([layer.p for layer in layers] + [layer.dropout for layer in sums])

    fit(module, scheduled("dropout", linear(1.0, 0.5)), Watch())
    bases = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0]
    for step, rates in enumerate(seen[::2]):
        assert rates == pytest.approx([base * linear(1.0, 0.5)(step, RUN) for base in bases])
    assert [layer.p for layer in layers] + [layer.dropout for layer in sums] == bases


class Broken(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        raise RuntimeError("broken")


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_everything_is_as_it_was_after_an_exception(make_trainer, data, regularized, fused):
    callbacks = [scheduled("dropout", constant(0.5)), scheduled("gradient_clip_val", constant(0.5)), Broken()]
    trainer = make_trainer(*[Fuse(verbose=False)] * fused, *callbacks, gradient_clip_val=0.4)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(regularized, data())
    assert regularized.net.rates() == [0.4, 0.2, 0.1, 0.0, 0.3]
    assert trainer.gradient_clip_val == 0.4


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_the_clip_value_is_that_of_each_step(fit, regression, fused, algorithm):
    factors = piecewise_constant([2, 4], [1.0, 0.1, 0.5])

    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.gradient_clip_val = 0.05 * factors(trainer.global_step)

    ours, theirs, unclipped = regression(sgd), regression(sgd), regression(sgd)
    clip = dict(gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    trainer = fit(ours, *[Fuse(verbose=False)] * fused, scheduled("gradient_clip_val", factors), **clip)
    fit(theirs, ByHand(), **clip)
    fit(unclipped, **clip)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours.net[0].weight, unclipped.net[0].weight, atol=1e-4)
    assert trainer.gradient_clip_val == 0.05


def test_the_clip_of_a_one_pass_optimizer(fit, regression):
    clips = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clips.append(trainer.optimizers[0].clip)

    module = regression(lambda m: AdamW(m.parameters(), clip=ClipNorm(2.0)))
    trainer = fit(module, scheduled("gradient_clip_val", linear(1.0, 0.5)), Watch())
    assert [clip.max_norm for clip in clips[::2]] == expected(linear(1.0, 0.5), 2.0)
    assert trainer.optimizers[0].clip == ClipNorm(2.0)


@pytest.mark.parametrize("clip", [ClipNorm(0.05), ClipPerTensor(0.03), ClipValue(0.01)], ids=repr)
@pytest.mark.parametrize("order", [1, -1])
def test_the_clip_of_gradient_clipping_folded_or_in_its_own_pass(fit, regression, clip, order):
    def run(*others):
        module = regression(sgd)
        fit(module, *[GradientClipping(clip), *others][::order])
        return module.state_dict()

    schedule = scheduled("gradient_clip_val", piecewise_constant([2, 4], [1.0, 0.1, 0.5]))
    own, folded, fixed = run(schedule), run(schedule, Fuse(verbose=False)), run()
    torch.testing.assert_close(own, folded, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own["net.0.weight"], fixed["net.0.weight"], atol=1e-4)


@pytest.mark.parametrize("order", [1, -1])
def test_the_l1_of_elastic_net_folded_or_in_its_own_pass(fit, regression, order):
    def run(*others, law=linear):
        module, elastic = regression(sgd), ElasticNet(l1=0.05, verbose=False)
        fit(module, *[elastic, scheduled("l1", law()), *others][::order])
        assert elastic.l1 == 0.05
        return module.state_dict()

    own, fixed, whole_groups = run(), run(law=constant), ParameterGroups(verbose=False)
    torch.testing.assert_close(own, run(Fuse(verbose=False), whole_groups), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own, run(Fuse(verbose=False)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(own["net.0.weight"], fixed["net.0.weight"], atol=1e-4)


def test_a_base_for_the_l1_of_elastic_net_is_applied_once(fit, regression):
    def run(l1, **arguments):
        module, schedule = regression(sgd), scheduled("l1", linear(), **arguments)
        fit(module, Fuse(verbose=False), ElasticNet(l1=l1, verbose=False), schedule)
        return module.state_dict()

    torch.testing.assert_close(run(0.01, base=0.05), run(0.05), rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1], ids=["after", "before"])
def test_the_decay_of_the_average(fit, regression, recorder, order):
    def averages(*callbacks):
        module = regression(adamw)
        fit(module, *callbacks, recorder)
        return module.state_dict()

    schedule = linear(0.5, 1.0)
    ordered = [WeightAveraging(EMA(0.9)), scheduled("average_decay", schedule)][::order]
    folded = averages(Fuse(verbose=False), *ordered)
    assert recorder.values("average_decay") == expected(schedule, 0.9)
    ordered = [WeightAveraging(EMA(0.9)), scheduled("average_decay", schedule)][::order]
    apart = averages(*ordered)
    torch.testing.assert_close(folded, apart, rtol=1e-5, atol=1e-6)
    fixed = averages(WeightAveraging(EMA(0.9)))
    assert not torch.allclose(apart["net.0.weight"], fixed["net.0.weight"], atol=1e-4)


@pytest.mark.parametrize("base", [None, 0.9])
@pytest.mark.parametrize("average", [PowerEMA(0.1), SWA(1)], ids=str)
@pytest.mark.parametrize("fuses", [True, False])
def test_an_average_without_that_decay_is_refused(fit, regression, average, base, fuses):
    schedule = HyperparameterSchedule("average_decay", linear(0.5, 1.0), base=base, verbose=False)
    callbacks = [Fuse(verbose=False)] if fuses else []
    message = r"\(name='average_decay'\): " + (
        r".* does not use it; schedule that of an EMA" if fuses else "nothing here has"
    )
    with pytest.raises(ValueError, match=message):
        fit(regression(adamw), *callbacks, WeightAveraging(average), schedule)


@pytest.mark.parametrize("first", [LAWA(2), SWA(1)], ids=str)
def test_the_decay_of_the_first_average_is_scheduled_or_it_is_refused(fit, regression, recorder, first):
    """A LAWA is no rival, behind an SWA the EMA keeps its own decay."""
    averages = [WeightAveraging(first, evaluate=False), WeightAveraging(EMA(0.9))]
    if isinstance(first, LAWA):
        fit(regression(adamw), *averages, scheduled("average_decay", linear(0.5, 1.0)), recorder)
        assert recorder.values("average_decay") == expected(linear(0.5, 1.0), 0.9)
    else:
        with pytest.raises(ValueError, match=r"^HyperparameterSchedule\(name='average_decay'\): nothing here has it"):
            fit(regression(adamw), *averages, scheduled("average_decay", linear(0.5, 1.0)))
