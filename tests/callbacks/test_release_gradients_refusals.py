# SPDX-License-Identifier: Apache-2.0
"""What needs the gradients of a whole step is refused beside ReleaseGradients, in a sentence."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from test_after_a_fit import Classifier, loader

from lightning_optkit.callbacks import Fuse, ReleaseGradients
from lightning_optkit.optimizers import AdamW, Prodigy

pytestmark = pytest.mark.filterwarnings("ignore")
ONE = dict(accumulate_grad_batches=1)


class Reads(Classifier):
    def on_before_optimizer_step(self, optimizer):
        self.norm = sum(p.grad.norm() for p in self.parameters())


class ReadsLater(Classifier):
    def on_after_backward(self):
        self.norm = sum(p.grad.norm() for p in self.parameters())


class Clips(Classifier):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, 1.0, "norm")


class Manual(Classifier):
    automatic_optimization = False


class Backward(Classifier):
    """A backward pass of its own inside training_step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        loss.backward(retain_graph=True)
        return super().training_step(batch, batch_idx)


class Changes(Classifier):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1:
            self.trainer.accumulate_grad_batches = 2
        return super().training_step(batch, batch_idx)


ADAMW, TORCHS = AdamW, torch.optim.AdamW
REFUSALS = {
    "torch's": (lambda: Classifier(TORCHS), {}, "AdamW has no one-pass step; add Fuse(), or use an optimizer of"),
    "no rule": (
        lambda: Classifier(torch.optim.Rprop),
        {},
        "Rprop has no one-pass step (no one-pass rule for torch.optim.Rprop); use an optimizer of",
    ),
    "LBFGS": (lambda: Classifier(torch.optim.LBFGS), {}, "LBFGS has no one-pass step"),
    "accumulation": (
        lambda: Classifier(ADAMW),
        dict(accumulate_grad_batches=2),
        "Trainer(accumulate_grad_batches=2) adds up the gradients",
    ),
    "later": (lambda: Changes(ADAMW), {}, "Trainer(accumulate_grad_batches=2) adds up the gradients"),
    "scheduler": (
        lambda: Classifier(ADAMW),
        dict(beside=[GradientAccumulationScheduler({1: 2})]),
        "GradientAccumulationScheduler({1: 2, 0: 1}) adds up the gradients",
    ),
    "by norm": (
        lambda: Classifier(TORCHS),
        dict(gradient_clip_val=1.0, beside=[Fuse(verbose=False)]),
        "ClipNorm(max_norm=1.0) needs the norm of all gradients",
    ),
    "by value, not fused": (
        lambda: Classifier(ADAMW),
        dict(gradient_clip_val=1.0, gradient_clip_algorithm="value"),
        "ClipValue(max_value=1.0) of the Trainer is no part of the step of AdamW; add Fuse()",
    ),
    "scaler": (lambda: Classifier(ADAMW), dict(precision="16-mixed"), "a loss scaler must see all gradients"),
    "hook": (lambda: Reads(ADAMW), {}, "Reads.on_before_optimizer_step is called when every gradient has been"),
    "later hook": (lambda: ReadsLater(ADAMW), {}, "ReadsLater.on_after_backward is called when every gradient has"),
    "own clip": (lambda: Clips(ADAMW), {}, "Clips.configure_gradient_clipping is called when every gradient has"),
    "manual": (lambda: Manual(ADAMW), {}, "Manual optimizes manually; it may call backward several times"),
    "estimate": (
        lambda: Classifier(Prodigy),
        {},
        "its rate is learned of all gradients",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_needs_the_gradients_is_refused_in_a_sentence(make_trainer, case):
    make, kwargs, said = REFUSALS[case]
    kwargs = dict(kwargs)
    beside, module = kwargs.pop("beside", []), make()
    with pytest.raises((ValueError, pl.utilities.exceptions.MisconfigurationException)) as refusal:
        make_trainer(*beside, ReleaseGradients(), **{**ONE, **kwargs}).fit(module, loader(), loader())
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert all(not p._post_accumulate_grad_hooks for p in module.parameters())


def test_two_backward_passes_for_a_step_are_refused(make_trainer):
    with pytest.raises(
        RuntimeError, match=r"^ReleaseGradients\(\.\.\.\): .* got a second gradient before optimizer\.step\(\)"
    ):
        make_trainer(ReleaseGradients(), **ONE).fit(Backward(AdamW), loader(), loader())
