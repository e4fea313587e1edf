# SPDX-License-Identifier: Apache-2.0
"""Fuse in real Trainers: results, checkpoints and side effects, compared with the same run without it."""

import contextlib
import copy
import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from torch.optim import lr_scheduler

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, LRSchedule, MaxNorm, WeightAveraging
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import warmup_cosine
from lightning_optkit.step import OnePassOptimizer

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
CLIPS = {
    "no clip": {},
    "norm": dict(gradient_clip_val=0.1),
    "value": dict(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
}
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "plain sgd": (torch.optim.SGD, dict(lr=0.1)),
    "adam": (torch.optim.Adam, dict(lr=0.02)),
    "adamw": (torch.optim.AdamW, dict(lr=0.02, amsgrad=True)),
    "adafactor": (torch.optim.Adafactor, dict(lr=0.02)),
}
TOLERANCE = 1e-6  # six steps on numbers of size 1 in fp32


class Peek(Callback):
    """The classes of the optimizers during the fit, and whether unscaling is part of their step."""

    def __init__(self):
        self.are_one_pass, self.fold_unscaling = set(), set()

    def on_train_batch_start(self, trainer, *_):
        for optimizer in trainer.optimizers:
            self.are_one_pass.add(isinstance(optimizer, OnePassOptimizer))
            self.fold_unscaling.add(getattr(optimizer, "_step_supports_amp_scaling", False))


def configured(name="adamw", **more):
    """Weights and biases in two groups, each with its own lr and decay."""
    optimizer_class, kwargs = OPTIMIZERS[name]

    def configure(module):
        weights = [p for p in module.parameters() if p.dim() > 1]
        biases = [p for p in module.parameters() if p.dim() == 1]
        groups = [dict(params=weights, weight_decay=0.1), dict(params=biases, lr=0.05, weight_decay=0.0)]
        return optimizer_class(groups, **{**kwargs, **more})

    return configure


def assert_close(module, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=tolerance)


def assert_equal(module, expected):
    assert_close(module, expected, tolerance=0)


def assert_moments_close(trainer, expected, tolerance=TOLERANCE):
    """Every state tensor that torch keeps, and its step counters; ours counts the steps of SGD as well."""
    states, expected_states = (t.optimizers[0].state_dict()["state"] for t in (trainer, expected))
    for key, state in expected_states.items():
        kept = {name: states[key][name] for name in state}
        torch.testing.assert_close(kept, state, rtol=0, atol=tolerance)


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


class Watcher(Callback):
    """Records the gradients before every step, and the lr of every group."""

    def __init__(self):
        self.grads, self.lrs = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append([p.grad.clone() for p in pl_module.parameters()])
        self.lrs.append([float(group["lr"]) for group in optimizer.param_groups])


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


# --- whatever configure_optimizers returns ---


def step_lr(optimizer):
    return lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)


FORMS = {
    "optimizer": lambda o: o,
    "list": lambda o: [o],
    "tuple": lambda o: (o,),
    "two lists": lambda o: ([o], [step_lr(o)]),
    "two lists with a config": lambda o: ([o], [{"scheduler": step_lr(o), "interval": "step"}]),
    "dict": lambda o: {"optimizer": o},
    "dict with a scheduler": lambda o: {"optimizer": o, "lr_scheduler": step_lr(o)},
    "dict with a config": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": step_lr(o), "interval": "step"}},
    "one cycle": lambda o: {"optimizer": o, "lr_scheduler": {"scheduler": one_cycle(o), "interval": "step"}},
    "plateau": lambda o: {
        "optimizer": o,
        "lr_scheduler": {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0), "monitor": "train_loss"},
    },
}


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


# --- checkpoints ---

# The runs that save keep every epoch; those that resume keep none.
resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")


def checkpointed(fit, regression, tmp_path, folder, *callbacks, configure, **kwargs):
    """An uninterrupted run of four epochs, and the checkpoint of its second."""
    keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
    module = regression(configure)
    trainer = fit(module, *callbacks, keep, epochs=4, enable_checkpointing=True, **kwargs)
    return module, trainer, tmp_path / folder / "epoch=1.ckpt"


@resuming
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", ["dict with a config", "one cycle"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resumed_equals_uninterrupted_bit_for_bit(regression, fit, tmp_path, name, form, precision):
    def configure(module):
        return FORMS[form](configured(name, fused=True)(module))

    arguments = dict(configure=configure, precision=precision, gradient_clip_val=0.1)
    whole, trainer, half = checkpointed(fit, regression, tmp_path, "fused", Fuse(), **arguments)
    resumed = regression(arguments.pop("configure"))
    resumed_trainer = fit(resumed, Fuse(), epochs=4, ckpt_path=half, **arguments)
    assert resumed_trainer.global_step == trainer.global_step == 8
    assert_equal(resumed, whole)
    assert_moments_close(resumed_trainer, trainer, tolerance=0)


@resuming
@pytest.mark.parametrize("with_fuse", ["before", "after"])
@pytest.mark.parametrize(
    "name, form",
    [*((name, "dict with a config") for name in OPTIMIZERS), ("sgd", "one cycle"), ("adamw", "one cycle")],
)
def test_a_checkpoint_continues_with_or_without_fuse(regression, fit, tmp_path, name, form, with_fuse):
    def configure(module):
        return FORMS[form](configured(name)(module))

    callbacks = [[Fuse()], []] if with_fuse == "before" else [[], [Fuse()]]
    whole, trainer, half = checkpointed(fit, regression, tmp_path, "first", *callbacks[0], configure=configure)
    resumed = regression(configure)
    resumed_trainer = fit(resumed, *callbacks[1], epochs=4, ckpt_path=half)
    assert resumed_trainer.global_step == trainer.global_step == 8
    assert_close(resumed, whole)


@resuming
@pytest.mark.parametrize("with_fuse", ["before", "after"])
@pytest.mark.parametrize("implementation", [dict(fused=True), dict(foreach=True), dict(fused=False)], ids=str)
def test_a_checkpoint_continues_in_torchs_own_implementation(regression, fit, tmp_path, implementation, with_fuse):
    """Under 16-mixed, where the loss scaler asks the optimizer whether it unscales by itself."""
    arguments = dict(configure=configured("adamw", **implementation), precision="16-mixed")
    callbacks = [[Fuse()], []] if with_fuse == "before" else [[], [Fuse()]]
    whole, _, half = checkpointed(fit, regression, tmp_path, "first", *callbacks[0], **arguments)
    resumed = regression(arguments.pop("configure"))
    fit(resumed, *callbacks[1], epochs=4, ckpt_path=half, **arguments)
    assert_close(resumed, whole)


@pytest.mark.parametrize("form", ["dict with a config", "one cycle"])
def test_a_checkpoint_saved_after_the_fit_resumes_too(regression, fit, tmp_path, form):
    def configure(module):
        return FORMS[form](configured("adamw")(module))

    whole, half = regression(configure), regression(configure)
    fit(whole, Fuse(), epochs=4)
    fit(half, Fuse(), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = regression(configure)
    fit(resumed, Fuse(), epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(resumed, whole)


# --- undone ---


def keys_after_a_plain_fit(regression, fit):
    module = regression(configured())
    fit(module)
    return set(vars(module))


class Stop(Exception):
    pass


class Failing(Callback):
    """Raises in one hook."""

    def __init__(self, hook):
        setattr(self, hook, self._fail)

    def _fail(self, *args, **kwargs):
        raise Stop


def torch_again(optimizer):
    groups = [set(group) for group in optimizer.param_groups]
    expected = torch.optim.AdamW([torch.ones(1, requires_grad=True)]).param_groups[0]
    return type(optimizer) is torch.optim.AdamW and all(group == set(expected) for group in groups)


@pytest.mark.parametrize("hook", [None, "setup", "on_fit_start", "on_train_batch_end", "on_train_end", "teardown"])
def test_leaves_module_and_optimizers_as_they_were(regression, fit, hook):
    """Also if the fit fails, in any hook."""
    built = []

    def configure(module):
        built.append(configured()(module))
        return built[-1]

    module = regression(configure)
    failing = [Failing(hook)] if hook else []
    with pytest.raises(Stop) if hook else contextlib.nullcontext():
        fit(module, Fuse(), *failing, gradient_clip_val=0.1)
    assert set(vars(module)) <= keys_after_a_plain_fit(regression, fit)
    assert all(torch_again(optimizer) for optimizer in built)


def test_leaves_the_module_as_it_was_after_an_exception_in_training_step(regression, fit):
    class Raising(regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise Stop
            return super().training_step(batch, batch_idx)

    module = Raising(configured())
    with pytest.raises(Stop):
        fit(module, Fuse(), gradient_clip_val=0.1)
    assert set(vars(module)) <= keys_after_a_plain_fit(regression, fit)
    assert torch_again(module.trainer.optimizers[0])


def test_fit_twice_with_one_callback(regression, fit):
    modules, fuse = [regression(configured()) for _ in range(2)], Fuse()
    for _ in range(2):
        fit(modules[0], gradient_clip_val=0.1)
        fit(modules[1], fuse, gradient_clip_val=0.1)
    assert_close(modules[1], modules[0])


def test_one_trainer_fits_on(regression, fit, data):
    modules = [regression(configured()) for _ in range(2)]
    for module, callbacks in zip(modules, ([], [Fuse()]), strict=True):
        trainer = fit(module, *callbacks, epochs=2)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, data(), data())
    assert_close(modules[1], modules[0])


def test_an_optimizer_that_the_module_keeps_is_converted_anew_in_every_fit(regression, fit):
    """Its second fit has no clip: the folded clip of the first must be gone."""

    class Keeping(regression):
        def __init__(self):
            super().__init__(None)
            self.optimizer = configured("adamw")(self)

        def configure_optimizers(self):
            return self.optimizer

    modules = [Keeping(), Keeping()]
    fit(modules[0], gradient_clip_val=1e-3, precision="16-mixed")
    fit(modules[1], Fuse(), gradient_clip_val=1e-3, precision="16-mixed")
    assert not getattr(modules[1].optimizer, "clip", None)
    assert not getattr(modules[1].optimizer, "_step_supports_amp_scaling", False)
    fit(modules[0], precision="16-mixed")
    fit(modules[1], Fuse(), precision="16-mixed")
    assert_close(modules[1], modules[0])


def test_validation_alone_converts_nothing(regression, make_trainer, data):
    module = regression(configured())
    make_trainer(Fuse(), limit_val_batches=1.0).validate(module, data(), verbose=False)
    assert "configure_optimizers" not in vars(module)


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
    assert ("Fuse left AdamW: one-pass already" in printed()) == bool(callbacks)


# --- the plan ---


def test_prints_what_it_will_do(regression, fit, printed):
    fit(regression(configured("adamw")), Fuse(), gradient_clip_val=0.1)
    text = printed()
    assert "lightning_optkit.AdamW" in text
    assert "adam_amsgrad" in text
    assert repr(ClipNorm(0.1)) in text
    assert "compiled (" in text or "reference: no compiled extension" in text
    assert "decay(0.1)" in text


def test_prints_which_optimizer_it_is_and_what_is_beside_it(regression, fit, printed):
    class Both(regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def two(module):
        return [torch.optim.SGD(module.net[0].parameters(), 0.1), torch.optim.Adam(module.net[2].parameters())]

    schedule = LRSchedule(warmup_cosine(0.05), verbose=False)
    fit(Both(two), Fuse(), MaxNorm(1.0), schedule, accumulate_grad_batches=1)
    lines = printed().splitlines()
    assert "Fuse, optimizer 0 of 2, net.0: lightning_optkit.SGD" in lines
    assert "Fuse, optimizer 1 of 2, net.2: lightning_optkit.Adam" in lines
    at = lines.index("in force besides:")
    assert lines[at + 1 : at + 4] == [
        "  MaxNorm(max_norm=1.0)",
        "  LRSchedule(schedule=warmup_cosine(warmup=0.05, min_factor=0.0,",
        "    start_factor=0.01))",
    ]


def test_prints_what_is_frozen_as_left_out(regression, fit, printed):
    module = regression(configured("adamw"))
    module.net[0].weight.requires_grad_(False)
    callback = Fuse()
    fit(module, callback)
    assert "left out, frozen: 1 tensors, 32 elements" in printed()


def test_prints_the_unscaling_where_it_is_folded_in(regression, fit, printed):
    fit(regression(configured()), Fuse(), precision="16-mixed")
    assert "unscale" in printed()


def test_prints_the_average_that_another_callback_folds_in(regression, fit, printed):
    fit(regression(configured()), Fuse(), WeightAveraging(EMA(0.9)))
    assert repr(EMA(0.9)) in printed()


def test_prints_nothing_if_asked(regression, fit, printed):
    fit(regression(configured()), Fuse(verbose=False))
    assert "lightning_optkit" not in printed()


class Explaining(Callback):
    def __init__(self, fuse):
        self.fuse, self.plans = fuse, []

    def on_train_batch_end(self, *_):
        self.plans = self.fuse.explain()


def test_explains_each_optimizer_while_the_fit_runs(regression, fit):
    fuse = Fuse(rounding="stochastic", state_dtype=torch.bfloat16, statistics=True)
    explaining = Explaining(fuse)
    fit(regression(configured()), fuse, explaining, gradient_clip_val=0.1, precision="bf16-true")
    (explanation,) = explaining.plans
    assert [plan.group for plan in explanation.groups] == [0, 1]
    assert {plan.dtype for plan in explanation.groups} == {plan.state_dtype for plan in explanation.groups}
    assert all({"stochastic", "statistics", repr(ClipNorm(0.1))} <= set(plan.stages) for plan in explanation.groups)
    assert fuse.explain() == []


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


def test_a_failing_configure_optimizers_shows_its_own_error(regression, fit):
    def configure(module):
        raise Stop

    module = regression(configure)
    with pytest.raises(Stop):
        fit(module, Fuse())
    assert "configure_optimizers" not in vars(module)


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
