# SPDX-License-Identifier: Apache-2.0
"""What Fuse prints before a fit, and explains during it."""

import torch
from fuse_cases import configured
from lightning.pytorch.callbacks import Callback

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, LRSchedule, MaxNorm, WeightAveraging
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.schedules import warmup_cosine


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
