# SPDX-License-Identifier: Apache-2.0
"""LRSchedule: the rate that each optimizer step saw, in every unit, and what it leaves alone or refuses."""

import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LightningCLI
from lr_schedule_cases import LR, RUN, Adversaries, Broken, expected, groups_of, num_tokens, quiet, sgd
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Fuse, LRSchedule
from lightning_optkit.callbacks.scheduling.clock import steps_in_run
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import (
    constant,
    cosine,
    exponential,
    inverse_time,
    linear,
    piecewise_constant,
    warmup,
    warmup_cosine,
)

pytestmark = [  # Lightning's warnings about these short runs
    pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args"),
]


def tensor_lr(module):
    return torch.optim.AdamW(module.parameters(), lr=torch.tensor(LR), foreach=False, capturable=False)


# --- what each step saw ---


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize(
    "schedule",
    [warmup_cosine(2), linear(), exponential(0.5), inverse_time(1.0), piecewise_constant([2, 0.9], [1.0, 0.1, 0.01])],
    ids=lambda schedule: schedule.name,
)
def test_each_step_sees_its_rate(fit, regression, recorder, schedule, fused):
    callbacks = [Fuse(verbose=False)] if fused else []
    fit(regression(lambda m: torch.optim.AdamW(groups_of(m))), *callbacks, quiet(schedule), recorder)
    assert recorder.values("lr") == expected(schedule)
    assert recorder.values("lr", group=1) == expected(schedule, base=0.3 * LR)


@pytest.mark.parametrize(
    "configure", [sgd, tensor_lr, lambda m: AdamW(m.parameters(), lr=LR)], ids=["SGD", "tensor lr", "one-pass"]
)
def test_the_weights_are_those_of_torch_under_lambda_lr(fit, regression, configure):
    schedule = warmup_cosine(0.4)

    def with_torch(module):
        optimizer = configure(module)
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, RUN))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    ours, theirs = regression(configure), regression(with_torch)
    fit(ours, quiet(schedule))
    fit(theirs)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


def test_a_tensor_is_filled_and_not_replaced(fit, regression):
    rate = torch.tensor(LR)
    fit(regression(lambda m: torch.optim.AdamW(m.parameters(), lr=rate, foreach=False)), quiet(linear(1.0, 0.5)))
    assert rate.item() == pytest.approx(0.5 * LR)


@pytest.mark.parametrize(
    ("interval", "positions", "total"),
    [
        ("step", [0, 1, 2, 3, 4, 5], 6),
        ("epoch", [0, 0, 1, 1, 2, 2], 3),
        ("fractional_epoch", [0, 0.5, 1, 1.5, 2, 2.5], 3),
        ("sample", [0, 4, 8, 12, 16, 20], 24),
    ],
)
def test_counts_in_the_unit_it_is_told(fit, regression, recorder, interval, positions, total):
    for schedule in (linear(), warmup(linear(), 1, start_factor=0.5)):
        recorder.steps.clear()
        fit(regression(sgd), quiet(schedule, interval), recorder)
        assert recorder.values("lr") == expected(schedule, positions, total)


def test_counts_tokens_as_it_is_told_to(fit, regression, recorder):
    fit(regression(sgd), quiet(linear(), "token", total=300, count=num_tokens), recorder)
    assert recorder.values("lr") == expected(linear(), [0, 40, 80, 120, 160, 200], 300)


def test_the_count_of_samples_is_independent_of_the_batch(fit, regression, recorder):
    fit(regression(sgd), quiet(linear(), "sample"), recorder, accumulate_grad_batches=3)  # windows of 3 and 1
    assert recorder.values("lr") == expected(linear(), [0, 6, 8, 14, 16, 22], 24)


def test_a_group_that_is_added_later_has_its_own_base(fit, regression, recorder):
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[0].parameters(), "lr": 0.7})

    def head_only(module):
        return torch.optim.SGD(module.net[2].parameters(), lr=LR)

    fit(regression(head_only), quiet(linear()), Unfreeze(), recorder, accumulate_grad_batches=1)
    assert recorder.values("lr") == expected(linear(), range(12), 12)
    later = [step[1]["lr"] for step in recorder.steps[0][4:]]
    assert later == expected(linear(), range(4, 12), 12, base=0.7)


def test_a_step_that_the_scaler_skips_counts(fit, regression, recorder):
    module = regression(sgd, poisoned=[(0, 0)])
    trainer = fit(module, quiet(linear()), recorder, precision="16-mixed")
    assert trainer.global_step == RUN
    assert recorder.values("lr") == expected(linear(), range(1, RUN))  # the first was not taken


def test_one_callback_serves_several_optimizers(fit, recorder):
    fit(Adversaries(), quiet(linear()), recorder, accumulate_grad_batches=1)
    assert recorder.values("lr") == expected(linear(), range(12), 12)
    assert recorder.values("lr", optimizer=1) == expected(linear(), range(1, 12, 2), 12, base=2 * LR)


def test_max_steps_of_several_optimizers(fit, recorder):
    module = Adversaries()
    trainer = fit(module, quiet(linear()), recorder, accumulate_grad_batches=1, max_steps=9)
    assert steps_in_run(trainer, module) == 5


# --- no side effects, arguments ---


@pytest.mark.parametrize("breaks", [False, True])
def test_the_module_is_as_it_was(fit, regression, breaks):
    module = regression(sgd)
    control = regression(sgd)
    fit(control)
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            fit(module, quiet(linear()), Broken())
    else:
        fit(module, quiet(linear()))
    assert vars(module).keys() == vars(control).keys()


def test_says_what_it_does(fit, regression, printed):
    fit(regression(lambda m: torch.optim.SGD(groups_of(m))), LRSchedule(linear()))
    assert f"LRSchedule: lr 0.03 to 0.1 times {linear()!r}, over 6 optimizer steps" in printed()


def test_survives_pickling():
    callback = quiet(linear(), "token", total=9, count=num_tokens)
    assert pickle.loads(pickle.dumps(callback)).schedule == linear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5,), r"^LRSchedule\(schedule=0.5\): schedule must be a Schedule, such as cosine\(\)\.$"),
        ((linear(), "batch"), r"^LRSchedule\(interval='batch'\): interval must be one of 'step', 'epoch', "),
        ((linear(), "token"), r"^LRSchedule\(count=None\): count must be a function from a batch to its number of tok"),
    ],
)
def test_rejects_bad_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LRSchedule(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0}, r"^LRSchedule\(total=0\): total must be an integer >= 1\.$"),
        ({"count": len}, r"^LRSchedule\(count=...\): count needs interval='sample' or 'token', not 'step'\.$"),
    ],
)
def test_rejects_bad_keywords(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRSchedule(linear(), **arguments)


def test_fractional_epochs_need_equal_epochs(fit, regression):
    with pytest.raises(
        ValueError, match=r"^LRSchedule\(interval='fractional_epoch'\): epochs must have a known and eq"
    ):
        fit(
            regression(sgd),
            quiet(linear(), "fractional_epoch"),
            GradientAccumulationScheduler({1: 2}),
            accumulate_grad_batches=1,
        )


CONFIG = """
seed_everything: false
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optkit.callbacks.LRSchedule
      init_args:
        interval: step
        schedule:
          class_path: lightning_optkit.schedules.warmup
          init_args:
            steps: 2
            schedule:
              class_path: lightning_optkit.schedules.cosine
              init_args: {min_factor: 0.5}
optimizer:
  class_path: torch.optim.SGD
  init_args: {lr: 0.1}
"""


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def train_dataloader(self):
        return DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 4)), batch_size=2)


def test_from_a_config_file(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(Plain, run=False, save_config_callback=None, args=["--config", str(tmp_path / "config.yaml")])
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, LRSchedule))
    assert callback.schedule == warmup(cosine(0.5), 2)
    cli.trainer.fit(cli.model)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert math.isclose(callback.values["lr"], 0.05)


def test_constant_leaves_everything_as_it_was(fit, regression):
    plain, ours = regression(sgd), regression(sgd)
    fit(plain)
    fit(ours, quiet(constant()))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name])
