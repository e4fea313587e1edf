# SPDX-License-Identifier: Apache-2.0
"""Fuse in real Trainers: the results are those of the same run without it."""

import copy
import re

import lightning.pytorch as pl
import pytest
import torch
from fuse_cases import (
    OPTIMIZERS,
    PRECISIONS,
    TOLERANCE,
    Peek,
    Watcher,
    assert_close,
    assert_equal,
    assert_moments_close,
    configured,
    keys_after_a_plain_fit,
    step_lr,
)
from lightning.pytorch.callbacks import BaseFinetuning

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, AdamW

CLIPS = {
    "no clip": {},
    "norm": dict(gradient_clip_val=0.1),
    "value": dict(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
}


# --- the defect of Lightning that Fuse mends ---


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_lightning_refuses_to_clip_for_a_fused_optimizer_under_mixed_precision(regression, fit, precision):
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(regression(configured(fused=True)), precision=precision, gradient_clip_val=0.1)


# --- the same numbers ---


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_unfused_run(regression, fit, name, clip, precision):
    """With `fused=True` in our run: Lightning could not even start it with a clip under mixed precision."""
    implementation = dict(foreach=True) if name == "adafactor" else dict(fused=True)
    expected, module = regression(configured(name)), regression(configured(name, **implementation))
    arguments = dict(precision=precision, **CLIPS[clip])
    expected_trainer = fit(expected, **arguments)
    peek = Peek()
    trainer = fit(module, Fuse(), peek, **arguments)
    assert (peek.are_one_pass, peek.fold_unscaling) == ({True}, {precision == "16-mixed"})
    assert trainer.global_step == expected_trainer.global_step == 6
    assert_close(module, expected)
    assert_moments_close(trainer, expected_trainer)


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_the_clips_of_these_tests_do_clip(regression, fit, clip):
    clipped, unclipped = regression(configured("plain sgd")), regression(configured("plain sgd"))
    fit(clipped, Fuse(), **CLIPS[clip])
    fit(unclipped, Fuse())
    assert (clipped.net[0].weight - unclipped.net[0].weight).abs().max() > 1e-2


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_equals_the_unfused_run_in_other_precisions(regression, fit, precision):
    expected, module = regression(configured("sgd")), regression(configured("sgd"))
    fit(expected, precision=precision)
    fit(module, Fuse(), precision=precision)
    # bf16: torch keeps its momentum in bf16, ours in fp32; six steps of lr 0.1, 2**-9 of gradients below 1
    assert_close(module, expected, tolerance=1e-12 if precision == "64-true" else 6 * 0.1 * 2**-9 + 2**-8)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_infinite_gradient_under_16_mixed_skips_the_step(regression, fit, name, is_watched, clip):
    """Epoch 1's first step and epoch 2's last: weights, counters and the loss scale as in Lightning's own run."""
    poisoned = [(1, 0), (2, 3)]
    expected, module = (regression(configured(name), poisoned) for _ in range(2))
    peek = Peek()
    watchers = [[Watcher()], [Watcher()]] if is_watched else [[], []]
    arguments = dict(precision="16-mixed", **CLIPS[clip])
    expected_trainer = fit(expected, *watchers[0], **arguments)
    trainer = fit(module, Fuse(), peek, *watchers[1], **arguments)
    assert peek.fold_unscaling == {not is_watched}
    assert_close(module, expected)
    assert_moments_close(trainer, expected_trainer)
    assert trainer.precision_plugin.state_dict() == expected_trainer.precision_plugin.state_dict()
    assert trainer.precision_plugin.scaler.get_scale() < 2.0**10
    if name == "adamw":
        assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {4.0}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whoever_watches_the_gradients_sees_them_unscaled(regression, fit, precision):
    watchers = Watcher(), Watcher()
    fit(regression(configured()), watchers[0], precision=precision, gradient_clip_val=0.1)
    fit(regression(configured()), Fuse(), watchers[1], precision=precision, gradient_clip_val=0.1)
    torch.testing.assert_close(watchers[1].grads, watchers[0].grads, rtol=0, atol=1e-6)


def test_a_module_that_watches_by_itself_sees_unscaled_gradients_too(regression, fit):
    class Watching(regression):
        def on_before_optimizer_step(self, optimizer):
            self.norm = max(p.grad.abs().max() for p in self.parameters())

    module = Watching(configured())
    fit(module, Fuse(), precision="16-mixed")
    assert module.norm < 10  # scaled it would be in the hundreds


# --- what it leaves alone ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_module_that_clips_by_itself_keeps_its_clipping(regression, fit, precision):
    class Clipping(regression):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.02)
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    modules = [Clipping(configured("sgd")) for _ in range(2)]
    fit(modules[0], precision=precision, gradient_clip_val=0.05)
    fit(modules[1], Fuse(), precision=precision, gradient_clip_val=0.05)
    assert_close(modules[1], modules[0])


class UsersAdamW(torch.optim.AdamW):
    """A user's own."""


LEFT_ALONE = {
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "UsersAdamW": lambda m: UsersAdamW(m.parameters(), lr=0.02),
}


@pytest.mark.filterwarnings("ignore:.*LBFGS:UserWarning")
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_optimizers_are_left_alone_clipped_and_named(regression, fit, printed, name):
    modules = [regression(LEFT_ALONE[name]) for _ in range(2)]
    fit(modules[0], gradient_clip_val=0.1)
    fuse = Fuse()
    fit(modules[1], fuse, gradient_clip_val=0.1)
    assert_equal(modules[1], modules[0])
    assert re.search(rf"^Fuse left {name}: .+; it runs as it is\.$", printed(), flags=re.MULTILINE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("callbacks", [[], [Fuse]], ids=["alone", "beside Fuse"])
@pytest.mark.parametrize("clip", CLIPS)
def test_an_optimizer_of_this_package_is_clipped_by_lightning(regression, fit, printed, clip, callbacks, precision):
    expected, module = (
        regression(lambda m, cls=cls: cls(m.parameters(), lr=0.02)) for cls in (torch.optim.AdamW, AdamW)
    )
    arguments = dict(precision=precision, **CLIPS[clip])
    fit(expected, **arguments)
    trainer = fit(module, *(callback() for callback in callbacks), **arguments)
    assert_close(module, expected)
    assert type(trainer.optimizers[0]) is AdamW
    assert ("Fuse left AdamW: one-pass already: lightning_optkit.AdamW\ngroup 0: adam\n" in printed()) == bool(
        callbacks
    )


def test_the_plan_of_an_optimizer_of_this_package_shows_its_stages(regression, fit, printed):
    fit(
        regression(lambda m: AdamW(m.parameters(), clip=ClipNorm(1.0), average=EMA(0.5))),
        Fuse(),
        WeightAveraging(EMA(0.5)),
    )
    assert (
        "\n  norm > ClipNorm(max_norm=1.0) > update > decay(0.01) >\n  EMA(decay=0.5, start=1, every=1)\n" in printed()
    )


def test_several_optimizers_of_this_package_are_told_apart_in_the_plan(regression, fit, printed):
    class Manual(Alternating, regression):
        def lr_schedulers(self):
            return []

    fit(
        Manual(lambda m: [SGD(m.net[0].parameters(), lr=0.1), AdamW(m.net[2].parameters())]),
        Fuse(),
        accumulate_grad_batches=1,
    )
    for start in ("0 of 2, net.0, left SGD", "1 of 2, net.2, left AdamW"):
        assert f"Fuse, optimizer {start}: one-pass already: lightning_optkit." in printed()


@pytest.mark.parametrize("is_set_later", [False, True])
def test_the_trainers_clip_beside_that_of_an_optimizer_is_refused(regression, fit, is_set_later):
    class Sets(pl.Callback):
        has_begun = False

        def on_train_batch_start(self, trainer, *_):
            self.has_begun, trainer.gradient_clip_val = True, 0.1

    module = regression(lambda m: AdamW(m.parameters(), clip=ClipNorm(1.0)))
    sets, clips = Sets(), {} if is_set_later else dict(gradient_clip_val=0.1)
    sentence = r"^Trainer\(gradient_clip_val=0\.1\): AdamW\(clip=ClipNorm\(max_norm=1\.0\)\) clips too; keep one\.$"
    with pytest.raises(ValueError, match=sentence):
        fit(module, Fuse(), sets, **clips)
    assert sets.has_begun == is_set_later


# --- manual optimization ---


class Alternating:
    """Two optimizers taking turns on one network; mixed into a module by the tests below."""

    automatic_optimization = False
    clip = None

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            if self.clip is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        if self.trainer.is_last_batch:
            for scheduler in self.lr_schedulers():
                scheduler.step()


def alternating(module):
    first = torch.optim.AdamW(module.net[0].parameters(), lr=0.02)
    second = torch.optim.SGD(module.net[2].parameters(), lr=0.1, momentum=0.9)
    return tuple({"optimizer": o, "lr_scheduler": step_lr(o)} for o in (first, second))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_manual_optimization(regression, fit, clip, precision):
    class Manual(Alternating, regression):
        pass

    Manual.clip = clip
    modules = [Manual(alternating), Manual(alternating)]
    fit(modules[0], precision=precision, accumulate_grad_batches=1)
    peek = Peek()
    trainer = fit(modules[1], Fuse(), peek, precision=precision, accumulate_grad_batches=1)
    assert peek.are_one_pass == {True}
    assert_close(modules[1], modules[0])
    assert [type(o) for o in trainer.optimizers] == [torch.optim.AdamW, torch.optim.SGD]


def test_a_module_reaches_the_optimizers_own_properties_through_lightnings_wrapper(regression, fit):
    class Reading(regression):
        def on_train_batch_end(self, *_):
            self.read = self.optimizers().grad_norm, self.optimizers().num_steps

    module = Reading(configured())
    fit(module, Fuse(), gradient_clip_val=0.1)
    assert module.read[0] > 0
    assert module.read[1] == 6


# --- bad input ---


def test_given_twice_is_refused_by_name(regression, fit):
    module = regression(configured())
    with pytest.raises(ValueError, match=r"^Fuse\(\): given twice"):
        fit(module, Fuse(), Fuse())
    assert set(vars(module)) <= keys_after_a_plain_fit(regression, fit)


@pytest.mark.parametrize("kwargs", [dict(rounding="up"), dict(state_dtype=torch.float16)], ids=str)
def test_a_bad_argument_is_refused_by_name(kwargs):
    with pytest.raises(ValueError, match=rf"^Fuse\({next(iter(kwargs))}="):
        Fuse(**kwargs)


def test_a_copy_of_the_callback_is_a_fresh_one(regression, fit):
    fuse = Fuse()
    fit(regression(configured()), copy.deepcopy(fuse))
    assert isinstance(copy.deepcopy(fuse), pl.Callback)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_clip_value_that_lightning_takes_for_none_is_none_here_too(regression, fit, value):
    plain, fused = (regression(configured("adamw")) for _ in range(2))
    fit(plain, gradient_clip_val=value)
    fit(fused, Fuse(), gradient_clip_val=value)
    assert_close(fused, plain)


# --- who asks what the optimizer is ---


class Unfreeze(BaseFinetuning):
    """Trains the last layer, and from the second epoch on the first one too, where the optimizer is of `kind`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1 and isinstance(optimizer, self.kind):
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_callback_that_asks_for_a_class_takes_the_branch_of_before(name, kind, regression, fit):
    optimizer_class, kwargs = OPTIMIZERS[name]
    weights = []
    for fuse in ([], [Fuse(verbose=False)]):
        module = regression(lambda module: optimizer_class(module.net[2].parameters(), **kwargs))
        start = module.net[0].weight.detach().clone()
        fit(module, *fuse, Unfreeze(kind))
        assert torch.equal(start, module.net[0].weight) is not issubclass(optimizer_class, kind)
        weights.append([parameter.detach() for parameter in module.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("given", "own", "said"),
    [
        ({"rounding": "split32"}, {}, "rounding='split32'): .* keeps its own rounding: 'nearest'. Give it rounding="),
        (
            {"state_dtype": "int8"},
            {},
            "state_dtype='int8'): .* keeps its own state_dtype: torch.float32. Give it state_",
        ),
        ({"statistics": True}, {}, "statistics=True): .* keeps its own statistics: False. Give it statistics=True"),
        ({"rounding": "kahan", "statistics": True}, {"rounding": "kahan", "statistics": True}, None),
        ({}, {"rounding": "split32", "state_dtype": "int8", "statistics": True}, None),
    ],
    ids=["rounding", "state_dtype", "statistics", "the same", "its own alone"],
)
def test_what_an_optimizer_of_this_package_does_not_take_from_it_is_said(regression, warned, given, own, said):
    module = regression(lambda module: AdamW(module.parameters(), **own))
    messages = warned("keeps its own", module, Fuse(verbose=False, **given))
    assert len(messages) == (said is not None)
    if said is not None:
        assert re.match(rf"Fuse\({said}".replace("): ", r"\): "), messages[0])
