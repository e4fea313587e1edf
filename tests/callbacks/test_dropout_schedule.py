# SPDX-License-Identifier: Apache-2.0
"""DropoutSchedule: the p in every forward pass."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_optkit.callbacks import DropoutSchedule, Fuse, HyperparameterSchedule
from lightning_optkit.schedules import linear


def dropping(regression, p=0.4, fail_at=None):
    class Dropping(regression):
        def __init__(self):
            super().__init__(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
            self.net = nn.Sequential(self.net, nn.Dropout(p), nn.Linear(2, 2))
            self.attention, self.seen = nn.MultiheadAttention(4, 2, dropout=p), []

        def on_train_batch_start(self, batch, batch_idx):
            torch.manual_seed(100 * self.current_epoch + batch_idx)

        def training_step(self, batch, batch_idx):
            self.seen.append((self.net[1].p, self.attention.dropout))
            if len(self.seen) == fail_at:
                raise KeyError("stop")
            return super().training_step(batch, batch_idx)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropping()


@pytest.mark.parametrize("callbacks", [[], [Fuse]], ids=["torch", "Fuse"])
def test_every_pass_sees_the_value_of_its_optimizer_step(regression, fit, callbacks):
    module = dropping(regression)
    fit(module, *[c() for c in callbacks], DropoutSchedule(linear(0.0, 1.0)))
    expected = [0.4 * step / 6 for step in range(6) for _ in range(2)]  # two batches per step
    assert [p for p, _ in module.seen] == pytest.approx(expected)
    assert [p for _, p in module.seen] == pytest.approx(expected)
    assert module.net[1].p == module.attention.dropout == 0.4


def test_one_base_for_all(regression, fit):
    module = dropping(regression)
    fit(module, DropoutSchedule(linear(1.0, 0.0), base=0.8))
    assert module.seen[0] == (0.8, 0.8)


def test_an_exception_leaves_the_modules_own_values(regression, fit):
    module = dropping(regression, fail_at=4)
    with pytest.raises(KeyError):
        fit(module, DropoutSchedule(linear(0.0, 1.0)))
    assert module.net[1].p == module.attention.dropout == 0.4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")
def test_resumed_equals_uninterrupted_bit_for_bit(regression, fit, tmp_path):
    whole, resumed = dropping(regression), dropping(regression)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    fit(whole, DropoutSchedule(linear(0.0, 1.0)), keep, epochs=4, enable_checkpointing=True)
    fit(resumed, DropoutSchedule(linear(0.0, 1.0)), epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert resumed.seen == whole.seen[8:]
    torch.testing.assert_close(dict(resumed.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, -1])
def test_two_that_schedule_dropout_are_refused(regression, fit, order):
    both = [DropoutSchedule(linear()), HyperparameterSchedule("dropout", linear())]
    with pytest.raises(ValueError, match=r"^DropoutSchedule\(\.\.\.\): HyperparameterSchedule schedules dropout too"):
        fit(dropping(regression), *both[::order])


def test_what_cannot_be_scheduled_is_refused(regression, fit):
    with pytest.raises(
        ValueError, match=r"^DropoutSchedule\(schedule=.*\): it multiplies dropout, but nothing here has it"
    ):
        fit(regression(lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), DropoutSchedule(linear()))
    with pytest.raises(
        ValueError, match=r"^DropoutSchedule\(schedule=.*\): it multiplies dropout, but it is 0 everywhere"
    ):
        fit(dropping(regression, p=0.0), DropoutSchedule(linear()))
    with pytest.raises(ValueError, match=r"^DropoutSchedule\(base=1\.5\): base must be in \[0, 1\]\.$"):
        DropoutSchedule(linear(), base=1.5)
