# SPDX-License-Identifier: Apache-2.0
"""LRFinder under a schedule that begins low: the rate that it finds is the schedule's largest."""

import pytest
import torch
from lr_finder_cases import Net, finder, fit, trained
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from lightning_optkit.callbacks import LRFinder, LRSchedule, ParameterGroups, PlateauSchedule
from lightning_optkit.optimizers import AdamW
from lightning_optkit.schedules import one_cycle

# Each begins below its base or its largest rate, one of them at 0.
BEGIN_LOW = {
    "OneCycleLR": lambda o, lr: OneCycleLR(o, max_lr=lr, total_steps=17, pct_start=5 / 17),
    "warm-up": lambda o, lr: LambdaLR(o, lambda step: min(1.0, (step + 1) / 5)),
    "warm-up from 0": lambda o, lr: LambdaLR(o, lambda step: min(1.0, step / 5)),
    "warm-up, cosine": lambda o, lr: SequentialLR(
        o, [LinearLR(o, 0.1, total_iters=5), CosineAnnealingLR(o, 11)], milestones=[5]
    ),
    "CyclicLR": lambda o, lr: CyclicLR(o, base_lr=lr / 20, max_lr=lr, step_size_up=4),
}


def begins_low(name, lr=0.1):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9)
        return [optimizer], [{"scheduler": BEGIN_LOW[name](optimizer, lr), "interval": "step"}]

    return configure


@pytest.mark.parametrize("rule", ["middle", "trained"])
@pytest.mark.parametrize("name", BEGIN_LOW)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # of SequentialLR itself
def test_the_largest_rate_of_a_schedule_that_begins_low_is_the_one_found(name, rule):
    found = trained() if rule == "trained" else finder()
    fit(module := Net(configure=begins_low(name)), found)
    rate = found.result.suggestions[rule]
    fit(plain := Net(configure=begins_low(name, rate)))
    used = [rates[0] for rates in module.rates[-16:]]
    assert max(used) == pytest.approx(rate) and used[0] < rate / 4
    assert used == pytest.approx([rates[0] for rates in plain.rates])


def test_groups_under_a_schedule_that_begins_low_keep_the_ratio_of_their_largest_rates():
    def configure(module):
        groups = [dict(params=module.net[0].parameters()), dict(params=module.net[4].parameters())]
        optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
        scheduler = OneCycleLR(optimizer, max_lr=[0.02, 0.1], total_steps=17, pct_start=5 / 17)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    fit(module := Net(configure=configure), found := finder())
    largest = [max(rates) for rates in zip(*module.rates[-16:], strict=True)]
    rate = found.result.suggestions["middle"]
    assert largest == pytest.approx([0.2 * rate, rate])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["OneCycleLR", "warm-up from 0"])
def test_lr_schedule_in_place_of_one_that_begins_low_has_the_rate_as_its_base(name, order, printed):
    found = finder()
    fit(module := Net(configure=begins_low(name)), *[found, LRSchedule(one_cycle(0.25))][::order])
    rate = found.result.suggestions["middle"]
    assert f"LRSchedule: lr {rate:g} times" in printed()
    assert max(rates[0] for rates in module.rates[-16:]) == pytest.approx(rate)


@pytest.mark.parametrize("name", ["OneCycleLR", "warm-up from 0"])
def test_groups_of_a_callback_keep_their_ratio_under_a_schedule_that_begins_low(name):
    groups = ParameterGroups(layer_decay=0.5, verbose=False)
    fit(module := Net(configure=begins_low(name)), groups, found := finder())
    largest = sorted({max(rates) for rates in zip(*module.rates[-16:], strict=True)})
    rate = found.result.suggestions["middle"]
    assert largest[-1] == pytest.approx(rate) and largest[0] <= rate / 2 and len(largest) > 1


def test_plateau_schedule_in_place_of_one_that_begins_low_starts_at_the_rate():
    found = finder()
    plateau = PlateauSchedule("loss", patience=10, check_on_train_epoch_end=True, verbose=False)
    fit(module := Net(configure=begins_low("warm-up from 0")), plateau, found)
    assert {rates[0] for rates in module.rates[-16:]} == {found.result.suggestions["middle"]}


def test_fuse_decays_as_before_under_a_schedule_that_begins_at_0():
    def configure(module):
        optimizer = AdamW(module.parameters(), lr=0.1, weight_decay=0.01, decouple_lr=True)
        return [optimizer], [{"scheduler": BEGIN_LOW["warm-up from 0"](optimizer, 0.1), "interval": "step"}]

    trainer = fit(Net(configure=configure), found := finder())
    assert trainer.optimizers[0].param_groups[0]["decay_lr"] == found.result.suggestions["middle"]


@pytest.mark.parametrize("apply", [True, False])
def test_it_says_where_a_schedule_begins(printed, apply):
    found = LRFinder(1e-5, num_steps=60, apply=apply)
    fit(Net(configure=begins_low("OneCycleLR")), found)
    rate = found.result.suggestions["middle"]
    before, said = ", 0.1 before; the schedule of the module begins at ", printed()
    is_now, begins = (f"is now {rate:.3g} (middle)", rate / 25) if apply else ("stays 0.1", 0.1 / 25)
    assert f"the rate {is_now}{before}{begins:.3g}. Tested" in said


def test_a_resumed_run_keeps_the_rates_of_a_schedule_that_begins_low(tmp_path):
    module, again = (Net(configure=begins_low("CyclicLR")) for _ in "ab")
    trainer = fit(module, found := finder(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(again, finder(), ckpt_path=tmp_path / "a.ckpt", max_epochs=3)
    assert max(rates[0] for rates in again.rates) == pytest.approx(found.result.suggestions["middle"])
