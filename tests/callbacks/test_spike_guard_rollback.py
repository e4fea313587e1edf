# SPDX-License-Identifier: Apache-2.0
"""SpikeGuard: weights and all that optimizers keep return bit for bit, also in a run that is resumed within."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from spike_guard_cases import LR, Broken, Net, equal, fit, frozen, guard, same
from torch import nn

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import (
    ExactResume,
    Fuse,
    GradientClipping,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip
from lightning_optkit.optimizers import Prodigy, ScheduleFreeAdamW


class Always(pl.Callback):
    """Weights are broken before every batch of these steps."""

    def __init__(self, since, until=1000):
        self.since, self.until = since, until

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.since <= trainer.global_step < self.until:
            with torch.no_grad():
                for param in pl_module.parameters():
                    param.mul_(-30)


class Recorder(pl.Callback):
    """What the run holds before each step that is taken, and after each rollback."""

    def __init__(self, guarded):
        self.guarded, self.before, self.after_rollback = guarded, {}, {}

    def _state(self, trainer, pl_module):
        optimizer = trainer.optimizers[0].state_dict()
        learned = [c.state_dict() for c in trainer.callbacks if isinstance(c, WeightAveraging | GradientClipping)]
        return frozen([pl_module.state_dict(), {k: v for k, v in optimizer.items() if k != "param_groups"}, learned])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before[trainer.global_step] = self._state(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.guarded.events and self.guarded.events[-1].step == trainer.global_step - 1:
            event = self.guarded.events[-1]
            if event.action in ("rollback", "stop"):
                self.after_rollback[event.back_to] = self._state(trainer, pl_module)


ROLLED_BACK = {
    "alone": list,
    "folded": lambda: [Fuse(verbose=False), GradientClipping(AutoClip(90)), WeightAveraging(EMA(0.9))],
    "own passes": lambda: [GradientClipping(AutoClip(90)), WeightAveraging(SWA(10))],
    "LAWA": lambda: [WeightAveraging(LAWA(3, every=5))],
}


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_broken_weights_return_bit_for_bit(name):
    guarded = guard()
    recorder = Recorder(guarded)
    fit(module := Net(), guarded, *ROLLED_BACK[name](), Broken({110}), recorder)
    rollbacks = [event for event in guarded.events if event.action == "rollback"]
    assert len(rollbacks) == 1 and 90 < rollbacks[0].back_to <= 110 < rollbacks[0].step < 120
    assert equal(recorder.after_rollback[rollbacks[0].back_to], recorder.before[rollbacks[0].back_to])
    assert sum(module.losses[-20:]) < 1.3 * sum(module.losses[80:100])
    fit(without := Net(), *ROLLED_BACK[name](), Broken({110}))
    assert sum(module.losses[-20:]) < 0.8 * sum(without.losses[-20:])


@pytest.mark.parametrize("every", [4, 7])
def test_a_copy_of_the_last_steps_before_the_losses_rose_is_not_used(every):
    """Harm that is done slowly shows late, so these steps may have had their share in it."""
    fit(Net(), guarded := guard(every=every), Always(110, 111))
    (back_to,) = [event.back_to for event in guarded.events if event.action == "rollback"]
    assert 90 < back_to <= 110 - 4


@pytest.mark.parametrize("optimizer", [Prodigy, ScheduleFreeAdamW], ids=["Prodigy", "Schedule-Free"])
def test_what_an_optimizer_learns_returns_too(optimizer):
    def configure(module):
        made = optimizer(module.parameters(), lr=1.0 if optimizer is Prodigy else LR)
        if hasattr(made, "train"):
            made.train()
        return made

    guarded = guard()
    fit(Net(configure=configure), guarded, Always(110, 111), recorder := Recorder(guarded))
    (back_to,) = [event.back_to for event in guarded.events if event.action == "rollback"]
    assert 90 < back_to <= 110 and equal(recorder.after_rollback[back_to], recorder.before[back_to])


def test_the_rate_grows_again_and_schedulers_do_not_see_it():
    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), LR)
        optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    rates = []  # of the update itself
    guarded = guard(rewarm=4)
    fit(module := Net(configure=configure), guarded, Always(110, 111))
    back = next(event.step for event in guarded.events if event.action == "rollback")
    plain = [LR * 0.99**step for step in range(160)]
    assert module.rates == pytest.approx(plain)
    factors = [rate / expected for rate, expected in zip(rates, plain, strict=True)]
    expected = [1.0] * (back + 1) + [0.2, 0.4, 0.6, 0.8] + [1.0] * 200
    assert factors == pytest.approx(expected[:160])


def test_it_gives_up_with_the_last_sound_state():
    guarded = guard(max_rollbacks=2)
    recorder = Recorder(guarded)
    with pytest.warns(
        UserWarning, match="too high after 2 rollbacks: back to the state before step .*, and the run stops"
    ):
        fit(module := Net(), guarded, Always(110), recorder)
    left = [event for event in guarded.events if event.action != "skip"]
    assert [event.action for event in left] == ["rollback", "rollback", "stop"]
    assert 90 < left[0].back_to <= 110 and 70 < left[1].back_to == left[2].back_to < left[0].back_to  # the older copy
    assert len(module.losses) < 130 and equal(frozen(module.state_dict()), recorder.before[left[2].back_to][0])


@pytest.mark.parametrize("since", [50, 100])
def test_without_copies_a_new_level_is_accepted(since):
    """Or a run whose data changed would never step again."""

    class Harder(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 40 if self.global_step >= since else loss

    guarded = guard(rollback=False)
    fit(module := Harder(), guarded)
    actions = [event.action for event in guarded.events]
    assert actions == ["skip", "skip", "accept"] and len(module.losses) == 160


@pytest.mark.filterwarnings("ignore:SpikeGuard. step", "ignore:You.re resuming", "ignore:Be aware that when using")
def test_a_resumed_run_counts_the_steps_before(tmp_path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    bad = dict.fromkeys(range(160), "nan")
    with pytest.raises(ValueError, match="21 in a row"):
        fit(Net(bad), ExactResume(), guard(), saves, enable_checkpointing=True)
    with pytest.raises(ValueError, match="of step 20 are nan and nan, and 21 in a row"):
        fit(Net(bad), ExactResume(), guard(), ckpt_path=tmp_path / "step=10.ckpt")


def test_copies_of_other_groups_are_not_used():
    class Unfreezes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 109:
                extra = nn.Parameter(torch.zeros(2))
                pl_module.extra = extra
                trainer.optimizers[0].add_param_group({"params": [extra]})

    guarded = guard()
    fit(Net(), guarded, Unfreezes(), Always(110), steps=130)
    assert "rollback" not in [event.action for event in guarded.events]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("name", ROLLED_BACK)
@pytest.mark.parametrize("stop_at", [111, 113, 116])
def test_resumed_within_a_rollback_it_is_exact(tmp_path, name, stop_at):
    def callbacks():
        return [ExactResume(), guard(rewarm=8), *ROLLED_BACK[name](), Broken({110})]

    fit(whole := Net(), *(of_whole := callbacks()))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=stop_at, save_top_k=-1, filename="{step}")
    first = Net()
    fit(first, *callbacks(), saves, steps=stop_at, enable_checkpointing=True)
    fit(
        resumed := Net(),
        *(of_resumed := callbacks()),
        saves,
        enable_checkpointing=True,
        ckpt_path=tmp_path / f"step={stop_at}.ckpt",
    )
    assert same(whole, resumed)
    assert of_whole[1].events == of_resumed[1].events and any(e.action == "rollback" for e in of_whole[1].events)


def test_a_damaged_state_changes_nothing():
    guarded = guard()
    fit(Net({120: "x100"}), guarded)
    before = guarded.state_dict()
    for damaged in (
        {},
        {**before, "detector": {}},
        {**before, "events": 3},
        {**before, "counts": [1]},
        {**before, "calm": -1},
        {**before, "copies": [{}]},
    ):
        with pytest.raises((TypeError, ValueError)):
            guarded.load_state_dict(damaged)
        assert equal(guarded.state_dict(), before)


def test_a_state_of_an_older_version_goes_on_from_its_older_copy():
    guarded, older = guard(every=4), guard(every=4)
    fit(Net(), guarded, steps=110)
    state = guarded.state_dict()
    del state["calm"]
    older.load_state_dict(state)
    assert equal(older.state_dict(), {**guarded.state_dict(), "calm": 0})
