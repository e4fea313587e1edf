# SPDX-License-Identifier: Apache-2.0
"""LookSAM in real Trainers against an explicit loop, and resumed."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from two_gradient_cases import Classifier, SeedEachBatch, assert_close, batches, trained, written_out

from lightning_optkit.callbacks import SAM, LookSAM


class Reused:
    """The gradient of Algorithm 1, with the direction of the last full batch."""

    def __init__(self, alpha):
        self.alpha = alpha

    def __call__(self, g, g_p, batch):
        if g_p is not None:
            cosine = (g @ g_p) / (g.norm() * g_p.norm())
            self.direction = g_p - g_p.norm() * cosine * g / g.norm()
            return g_p
        return g + self.alpha * g.norm() / self.direction.norm() * self.direction


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-4)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_equals_the_loop_that_is_written_out_over_200_batches(make_trainer, accumulate, dtype, tolerance):
    module = Classifier()
    callback = LookSAM(rho=0.2, k=3, alpha=0.5)
    found = trained(make_trainer, callback, accumulate=accumulate, dtype=dtype, module=module)
    expected = written_out(Reused(0.5), 0.2, accumulate=accumulate, dtype=dtype, is_full=lambda batch: batch % 3 == 0)
    assert_close(found, expected, tolerance)
    assert len(module.seen) == 200 + 67


def test_with_every_batch_it_is_sam(make_trainer):
    found = trained(make_trainer, LookSAM(rho=0.2, k=1), steps=20)
    assert_close(found, trained(make_trainer, SAM(rho=0.2), steps=20), 1e-6)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("per_epoch", [3, 4, 5])  # the next batch is a full one, or one of the two between
def test_a_resumed_run_continues_with_its_direction_and_its_count(make_trainer, tmp_path, per_epoch):
    straight, found = Classifier(), Classifier()
    data = torch.utils.data.DataLoader(batches(per_epoch), batch_size=None)
    make_trainer(LookSAM(k=3), SeedEachBatch(), epochs=3).fit(straight, data)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer(LookSAM(k=3), SeedEachBatch(), saving, epochs=1, enable_checkpointing=True).fit(Classifier(), data)
    path = str(tmp_path / "epoch=0.ckpt")
    make_trainer(LookSAM(k=3), SeedEachBatch(), epochs=3).fit(found, data, ckpt_path=path, weights_only=False)
    assert_close(found.net.state_dict(), straight.net.state_dict(), 0)
    assert straight.seen[-1].equal(found.seen[-1]) and len(found.seen) < len(straight.seen)


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_direction_that_overflowed_is_not_reused(make_trainer):
    class FirstHuge(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 if batch_idx == 0 else loss

    module = FirstHuge()
    before = module.net[0].weight.detach().clone()
    found = trained(make_trainer, LookSAM(k=100), steps=6, module=module, precision="16-mixed")
    assert all(value.isfinite().all() for value in found.values())
    assert not torch.equal(found["0.weight"], before)


def test_layers_that_are_frozen_within_a_period_take_a_gradient_of_their_own(make_trainer):
    class Freezing(Classifier):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                self.net[4].requires_grad_(False)
            return super().training_step(batch, batch_idx)

    module = Freezing()
    trained(make_trainer, LookSAM(k=100), steps=5, module=module)
    assert len(module.seen) >= 7  # two full batches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(k=0), r"^LookSAM\(k=0\): k must be an integer >= 1\.$"),
        (dict(alpha=-0.1), r"^LookSAM\(alpha=-0\.1\): alpha must be in \[0, inf\)\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookSAM(**arguments)
