# SPDX-License-Identifier: Apache-2.0
"""BatchSizeSchedule beside schedules of the rate, and the counts of steps that it changes."""

import lightning.pytorch as pl
import pytest
import torch
from batch_size_schedule_cases import GROWS, schedule, sgd, training, twelve
from torch import nn
from torch.optim import lr_scheduler

from lightning_optkit.callbacks import LRSchedule
from lightning_optkit.callbacks.scheduling.lr_scaling import multiply_bases
from lightning_optkit.schedules import linear, warmup_cosine

pytestmark = pytest.mark.filterwarnings("ignore")

train = pytest.fixture(training)


def test_lr_schedule_in_samples(train, recorder):
    for callbacks in (
        [LRSchedule(linear(), "sample", verbose=False), schedule(GROWS, "linear")],
        [schedule(GROWS, "linear"), LRSchedule(linear(), "sample", verbose=False)],
    ):
        recorder.steps.clear()
        train(*callbacks, recorder)
        starts = (
            [(2 * k, 2) for k in range(6)] + [(12 + 4 * k, 4) for k in range(3)] + [(24 + 6 * k, 6) for k in (0, 1)]
        )
        expected = [0.1 * size / 2 * linear()(samples, 36) for samples, size in starts]
        assert recorder.values("lr") == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
        lambda o: lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.3, step_size_up=3, cycle_momentum=False),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], [4]
        ),
    ],
    ids=["lambda", "step", "cosine", "one_cycle", "cyclic", "sequential"],
)
def test_torch_schedulers_go_on_from_the_scaled_rate(train, recorder, make):
    def configure(module):
        optimizer = sgd(module)
        return [optimizer], [{"scheduler": make(optimizer), "interval": "step"}]

    train(schedule(GROWS, "linear"), recorder, configure=configure)
    scaled, plain = recorder.values("lr"), []
    recorder.steps = {}
    train(schedule(GROWS, "none"), recorder, configure=configure)
    factors = [1] * 6 + [2] * 3 + [3] * 2
    plain = recorder.values("lr")
    assert scaled == pytest.approx([lr * factor for lr, factor in zip(plain, factors, strict=True)], rel=1e-12)


def test_a_group_that_is_added_has_its_own_base(train, recorder):
    class Unfreeze(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 0):
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[2].parameters()), "lr": 0.01})

    def head(module):
        return torch.optim.SGD(module.net[0].parameters(), lr=0.1)

    train(schedule(GROWS, "linear"), Unfreeze(), recorder, configure=head)
    late = [step[1]["lr"] for step in recorder.steps[0] if len(step) == 2]
    assert late == [0.02] * 2 + [0.03] * 2


def test_a_base_that_was_lowered_meanwhile_stays_lowered():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    multiply_bases([optimizer], [], 2.0)
    (group,) = optimizer.param_groups
    group["lr"].mul_(0.5), group.update(initial_lr=group["initial_lr"] * 0.5)
    multiply_bases([optimizer], [], 4.0)
    assert float(group["lr"]) == pytest.approx(0.2)
    multiply_bases([optimizer], [], 1.0)
    assert float(group["lr"]) == pytest.approx(0.05) == float(group["initial_lr"])


@pytest.mark.parametrize(
    "other, kwargs, loader",
    [
        (LRSchedule(warmup_cosine(warmup=0.1), verbose=False), {}, {}),
        (LRSchedule(linear(), "fractional_epoch", verbose=False), {}, {}),
        (LRSchedule(linear(), "epoch", verbose=False), dict(max_steps=7), {}),
        (LRSchedule(linear(), "sample", verbose=False), {}, dict(batch_size=5, drop_last=True)),
    ],
    ids=["step", "fractional_epoch", "max_steps", "drop_last"],
)
def test_a_count_that_would_be_wrong(train, other, kwargs, loader):
    with pytest.raises(ValueError, match=r"BatchSizeSchedule\(...\) and LRSchedule\(interval='\w+'\): the epochs of"):
        train(schedule(), other, loader=twelve(**loader), **kwargs)


def test_a_total_in_steps_may_be_given(train, recorder):
    train(schedule(), LRSchedule(linear(), total=11, verbose=False), recorder)
    assert recorder.values("lr") == pytest.approx([0.1 * linear()(step, 11) for step in range(11)])


def test_the_estimate_of_the_steps_is_put_right(train, printed):
    def configure(module):
        assert module.trainer.estimated_stepping_batches == 18
        return sgd(module)

    with pytest.warns(UserWarning, match="this run has 11 steps"):
        _, trainer, seen = train(schedule(), configure=configure)
    assert trainer.global_step == 11
    assert seen.sizes() == [[2] * 6, [4] * 3, [6] * 2]
