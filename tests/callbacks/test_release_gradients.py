# SPDX-License-Identifier: Apache-2.0
"""Gradients released in the backward pass of whole fits: bitwise the ordinary run, or refused in a sentence."""

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_after_a_fit import OPTIMIZERS, ROWS, Classifier, loader
from torch import nn

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import (
    SAM,
    ElasticNet,
    ExactResume,
    Fuse,
    GradientClipping,
    HyperparameterSchedule,
    MaxNorm,
    ReleaseGradients,
    Report,
    WeightAveraging,
)
from lightning_optkit.clipping import ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import SGD, AdamW, Lion
from lightning_optkit.schedules import linear

pytestmark = pytest.mark.filterwarnings("ignore")
ONE = dict(accumulate_grad_batches=1)
REFUSED = {  # the rows of test_after_a_fit.py, and what the refusal is about
    "SAM": "SAM restores the weights after the backward pass",
    "BatchRegime": r"BatchRegime\.on_after_backward is called when every gradient",
    "BatchRegime of all": r"BatchRegime\.on_after_backward is called when every gradient",
    "ElasticNet": "acts between the gradients and the update",  # its L2 is no part of SGD's step
    "ExactAccumulation": r"ExactAccumulation\.on_after_backward is called when every gradient",
    "GradientClipping": r"ClipNorm\(max_norm=1\.0\) needs the norm of all gradients",
    "GradientClipping by AutoClip": "needs the norm of all gradients",
    "GradientClipping by ZClip": "needs the norm of all gradients",
    "GradientNoise": r"GradientNoise\.on_before_optimizer_step is called when every gradient",
    "Grokfast": r"Grokfast\.on_before_optimizer_step is called when every gradient",
    "ReleaseGradients": "given twice",
    "ScheduleFreeWrapper": "acts between the gradients and the update",
    "SpikeGuard": r"SpikeGuard\.on_before_optimizer_step is called when every gradient",
    "WeightAveraging by LAWA": "acts between the gradients and the update",
    "WeightAveraging with buffers": "acts between the gradients and the update",
}


class Recorder(pl.Callback):
    """The losses, and the gradients left after each batch."""

    def __init__(self):
        self.losses, self.alive = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.alive.append(sum(p.grad is not None for p in pl_module.parameters()))


def state_of(trainer, pl_module):
    """Parameters and their state."""
    params, state = list(pl_module.parameters()), trainer.optimizers[0].state
    return copy.deepcopy([p.detach() for p in params]), copy.deepcopy([dict(state.get(p, {})) for p in params])


def run(make_trainer, make_module, callbacks_of, releases, **kwargs):
    """Losses, state and counts of a fit."""
    recorder, module = Recorder(), make_module()
    own = callbacks_of()
    torch.manual_seed(0)
    trainer = make_trainer(*own, *([ReleaseGradients()] if releases else []), recorder, **{**ONE, **kwargs})
    trainer.fit(module, loader(), loader())
    optimizer = trainer.optimizers[0]
    found = recorder.losses, *state_of(trainer, module), trainer.global_step, getattr(optimizer, "num_steps", None)
    assert all(alive == 0 for alive in recorder.alive) or not releases
    assert all(not p._post_accumulate_grad_hooks for p in module.parameters() if p.requires_grad)
    return found


def assert_same(make_trainer, make_module, callbacks_of, **kwargs):
    ordinary = run(make_trainer, make_module, callbacks_of, False, **kwargs)
    released = run(make_trainer, make_module, callbacks_of, True, **kwargs)
    torch.testing.assert_close(released, ordinary, rtol=0, atol=0, equal_nan=True)
    assert released[3] > 1


def optimizer_of(cls, **kwargs):
    def configure(params, lr):
        return cls(params, lr=lr, **copy.deepcopy(kwargs))

    return lambda: Classifier(configure)


MODULES = {
    "AdamW": (optimizer_of(AdamW), {}),
    "SGD": (optimizer_of(SGD, momentum=0.9), {}),
    "Lion": (optimizer_of(Lion), {}),
    "EMA": (optimizer_of(AdamW, average=EMA(0.9)), {}),
    "EMA, every second": (optimizer_of(AdamW, average=EMA(0.9, start=2, every=2)), {}),
    "split24, int8": (optimizer_of(AdamW, rounding="split24", state_dtype="int8"), dict(precision="bf16-true")),
    "split32, EMA": (optimizer_of(AdamW, rounding="split32", average=EMA(0.9)), dict(precision="bf16-true")),
    "stochastic": (optimizer_of(AdamW, rounding="stochastic"), dict(precision="bf16-true")),
    "by tensor": (optimizer_of(AdamW, clip=ClipPerTensor(0.01)), {}),
    "by unit": (optimizer_of(AdamW, clip=ClipUnitwise(0.01)), {}),
    "mixed": (optimizer_of(AdamW), dict(precision="bf16-mixed")),
}


@pytest.mark.parametrize("case", MODULES)
def test_losses_weights_and_state_are_bitwise_those_of_the_ordinary_run(make_trainer, case):
    make_module, kwargs = MODULES[case]
    assert_same(make_trainer, make_module, list, **kwargs)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_torchs_optimizers_beside_fuse(make_trainer, cls):
    assert_same(make_trainer, lambda: Classifier(cls), lambda: [Fuse(state_dtype="int8", verbose=False)])


@pytest.mark.parametrize("name", ROWS)
def test_every_callback_beside_it_gives_the_same_run_or_is_refused(make_trainer, name):
    def make():
        return [*([] if name == "Fuse" else [Fuse(verbose=False)]), ROWS[name]()]

    def module():
        return Classifier(OPTIMIZERS.get(name, torch.optim.SGD))

    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]) as refusal:
            run(make_trainer, module, make, True)
        assert "\n" not in str(refusal.value)
    else:
        assert_same(make_trainer, module, make, limit_val_batches=1.0)


MORE = {
    "two averages": (lambda: [WeightAveraging(EMA(0.9)), WeightAveraging(EMA(0.5), evaluate=False)], "acts between"),
    "LAWA": (lambda: [WeightAveraging(LAWA(2))], "acts between"),
    "SWA": (lambda: [WeightAveraging(SWA(0.5))], None),
    "by value": (lambda: [GradientClipping(ClipValue(1e-3))], None),
    "by tensor": (lambda: [GradientClipping(ClipPerTensor(1e-3))], None),
    "L1": (lambda: [ElasticNet(l1=0.1)], None),
    "L2 apart": (lambda: [ElasticNet(l2=0.1)], "acts between"),
    "max norm, report": (lambda: [MaxNorm(0.1), Report(write=False)], None),
    "SAM": (lambda: [SAM()], "SAM restores"),
}


@pytest.mark.parametrize("case", MORE)
@pytest.mark.parametrize("first", [False, True])
def test_in_either_order(make_trainer, case, first):
    make, refused = MORE[case]
    module = optimizer_of(SGD, momentum=0.9)
    if refused is None:
        assert_same(make_trainer, module, make)
        return
    beside = [ReleaseGradients(), *make()] if first else [*make(), ReleaseGradients()]
    with pytest.raises(ValueError, match=refused):
        make_trainer(*beside, **ONE).fit(module(), loader(), loader())


# --- what is counted ---


class Skips(Classifier):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


def test_a_batch_without_a_loss_is_no_step(make_trainer, monkeypatch):
    for beside in ([], [ReleaseGradients()]):
        seen = []
        monkeypatch.setattr(MaxNorm, "_project", lambda self, *_, seen=seen: seen.append(self))
        trainer = make_trainer(MaxNorm(1.0), *beside, **ONE, epochs=2)
        trainer.fit(Skips(AdamW), loader(), loader())
        assert (len(seen), trainer.optimizers[0].num_steps) == (4, 4)


class Twice(Classifier):
    """The second branch has a gradient in some steps only, and is frozen in the first epoch if asked to be."""

    def __init__(self, optimizer, frozen=False):
        super().__init__(optimizer)
        self.branch, self.frozen = nn.Linear(8, 3), frozen
        with torch.no_grad():
            self.branch.weight.fill_(0.1)
            self.branch.bias.zero_()
        self.branch.requires_grad_(not frozen)

    def on_train_epoch_start(self):
        self.branch.requires_grad_(not self.frozen or self.current_epoch > 0)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        uses = (self.current_epoch, batch_idx) not in ((0, 0), (0, 1), (1, 2))
        return loss + self.branch(batch[0].flatten(1)).square().mean() if uses else loss


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("average", [None, EMA(0.5), EMA(0.5, start=2, every=2), SWA(2)], ids=repr)
def test_parameters_without_a_gradient_in_some_steps_and_unfrozen_ones(make_trainer, average, frozen):
    cls = partial(AdamW, average=average, rounding="stochastic")
    assert_same(make_trainer, lambda: Twice(cls, frozen), list, precision="bf16-true")


def test_gradients_are_never_all_there(make_trainer):
    most = []

    class Watching(Classifier):
        def training_step(self, batch, batch_idx):
            for layer in self.net:
                layer.register_full_backward_pre_hook(
                    lambda *_: most.append(sum(p.grad is not None for p in self.parameters()))
                )
            return super().training_step(batch, batch_idx)

    for releases, expected in ((True, 0), (False, 8)):
        most.clear()
        trainer = make_trainer(*([ReleaseGradients()] if releases else []), **ONE, epochs=1, limit_train_batches=1)
        trainer.fit(Watching(AdamW), loader(), loader())
        assert max(most) == expected if releases else max(most) >= expected


def test_a_schedule_of_the_trainers_clip_acts_in_the_same_step(make_trainer):
    kwargs = dict(gradient_clip_val=0.01, gradient_clip_algorithm="value")

    def beside():
        return [Fuse(verbose=False), HyperparameterSchedule("gradient_clip_val", linear(1.0, 0.01), verbose=False)]

    assert_same(make_trainer, lambda: Classifier(torch.optim.SGD), beside, **kwargs)


class Bounds(Classifier):
    """Sets the Trainer's clip itself, in the middle of a step."""

    def training_step(self, batch, batch_idx):
        self.trainer.gradient_clip_val = 0.01 / (1 + batch_idx)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("first", [False, True])
def test_a_clip_that_the_module_sets_acts_in_the_same_step(make_trainer, first):
    found = []
    for releases in (False, True):
        beside, recorder, module = [Fuse(verbose=False)], Recorder(), Bounds(torch.optim.SGD)
        if releases:
            beside.insert(0 if first else 1, ReleaseGradients())
        torch.manual_seed(0)
        make_trainer(*beside, recorder, gradient_clip_algorithm="value", **ONE).fit(module, loader(), loader())
        found.append((recorder.losses, dict(module.state_dict())))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- checkpoints ---


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_run_is_resumed_from_the_middle_of_an_epoch_with_or_without_it(make_trainer, tmp_path, before, after):
    def trainer_of(releases, **kwargs):
        own = [ReleaseGradients()] if releases else []
        return make_trainer(Fuse(verbose=False), WeightAveraging(EMA(0.5)), ExactResume(), *own, **ONE, **kwargs)

    whole = Classifier(torch.optim.AdamW)
    torch.manual_seed(0)
    trainer_of(True).fit(whole, loader(), loader())
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    own = [ReleaseGradients()] if before else []
    first = make_trainer(
        Fuse(verbose=False),
        WeightAveraging(EMA(0.5)),
        ExactResume(),
        *own,
        keep,
        **ONE,
        max_steps=4,
        enable_checkpointing=True,
    )
    torch.manual_seed(0)
    first.fit(Classifier(torch.optim.AdamW), loader(), loader())
    module = Classifier(torch.optim.AdamW)
    trainer_of(after).fit(module, loader(), loader(), ckpt_path=tmp_path / "step=4.ckpt")
    torch.testing.assert_close(module.state_dict(), whole.state_dict(), rtol=0, atol=0)


# --- what it says, and undone ---


def test_the_plan_says_so(make_trainer, printed):
    make_trainer(Fuse(), ReleaseGradients(), **ONE).fit(Classifier(torch.optim.AdamW), loader(), loader())
    assert "in backward > update" in printed()


def test_after_a_failure_the_ordinary_step_is_back(make_trainer):
    module = Classifier(AdamW)
    module.fails_at = (1, 1)
    trainer = make_trainer(ReleaseGradients(), **ONE)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(module, loader(), loader())
    optimizer, params = trainer.optimizers[0], list(module.parameters())
    before = [p.detach().clone() for p in params]
    module(torch.ones(2, 8)).sum().backward()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and params[0].grad is not None
    optimizer.step()
    assert not torch.equal(params[0], before[0])
